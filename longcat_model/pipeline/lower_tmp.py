from longcat_model.pipeline.ir import Action, Kind, transfer


def lower(schedule, placement, microbatches):
    out = []
    S = len(placement)
    for row in schedule:
        r = []
        for a in row:
            s, k, n = a
            if k is Kind.F and s and placement[s - 1] != placement[s]:
                r.append(Action(s, Kind.RECV_F, n))
            if k in (Kind.I, Kind.B) and s < S - 1 and placement[s + 1] != placement[s]:
                r.append(Action(s, Kind.RECV_B, n))
            r.append(a)
            t_ = transfer(a, placement)
            if t_:
                r.append(t_)
        out.append(tuple(r))
    return tuple(out)
