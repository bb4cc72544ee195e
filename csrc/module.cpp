// longcat_kernels._C: one bind_<op> a line. Torch is seen only through bindings/tensor_view.h.
#include "bindings/cuda.h"
#include "bindings/depth_decode.h"
#include "bindings/depth_decode_cuda.h"
#include "bindings/ema_update.h"
#include "bindings/ema_update_cuda.h"
#include "bindings/fused_moe.h"
#include "bindings/fused_moe_backward.h"
#include "bindings/grouped_mm.h"
#include "bindings/moe_plan.h"
#include "bindings/moe_route.h"
#include "bindings/ngram_embedding.h"
#include "bindings/ngram_embedding_weight_grad.h"
#include "bindings/peak.h"
#include "bindings/rvq_decode.h"
#include "bindings/rvq_decode_cuda.h"
#include "bindings/rvq_encode.h"
#include "bindings/rvq_encode_backward.h"
#include "bindings/rvq_encode_cuda.h"
#include "bindings/schedule_search.h"
#include "longcat/isa.h"

namespace {

// What this module was built from and by, and what of it runs here.
pybind11::dict build_info() {
    pybind11::dict info;
    info["version"] = LONGCAT_VERSION;
    info["commit"] = LONGCAT_COMMIT;
    info["sources"] = LONGCAT_SOURCES;
    info["compiler"] = LONGCAT_COMPILER;
    info["cxx_standard"] = __cplusplus;
#ifdef _OPENMP
    info["openmp"] = _OPENMP;
#else
    info["openmp"] = pybind11::none();
#endif
    info["isas_compiled"] = longcat::compiled_isas();
    info["isas_available"] = longcat::available_isas();
    info["isa"] = longcat::available_isas().back();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled implementations of longcat_kernels.";
    m.def("build_info", &build_info);
    longcat::bind_rvq_encode(m);
    longcat::bind_rvq_encode_backward(m);
    longcat::bind_rvq_decode(m);
    longcat::bind_ema_update(m);
    longcat::bind_cuda(m);
    longcat::bind_rvq_encode_cuda(m);
    longcat::bind_rvq_decode_cuda(m);
    longcat::bind_ema_update_cuda(m);
    longcat::bind_depth_decode_cuda(m);
    longcat::bind_peak(m);
    longcat::bind_ngram_embedding(m);
    longcat::bind_ngram_embedding_weight_grad(m);
    longcat::bind_grouped_mm(m);
    longcat::bind_moe_plan(m);
    longcat::bind_moe_route(m);
    longcat::bind_fused_moe(m);
    longcat::bind_fused_moe_backward(m);
    longcat::bind_depth_decode(m);
    longcat::bind_schedule_search(m);
}
