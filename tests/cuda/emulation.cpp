#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>

#include "longcat/dtypes.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace longcat::cuda {
namespace {

constexpr size_t kStackBytes = 256 << 10;

// Waits until `size` threads have come.
struct Barrier {
    u32 size, arrived = 0, generation = 0;
};

struct Warp {
    Barrier barrier{kWarp};
    u32 slots[2][kWarp];  // two sets take turns: a lane may come to the next exchange before all have read
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t entry;
    jmp_buf at;
    bool started, done;
    u32 exchanges;
};

// The one block that runs. Fibers enter by ucontext and switch by jumps, which cost no system call.
struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier{0};
    u32 x = 0, y = 0, threads = 0, current = 0;
    u64 progress = 0;
    const std::function<void()>* body = nullptr;
    jmp_buf scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_bytes = 0;
} block;

void entering(const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(nullptr, stack, bytes);
#else
    (void)stack, (void)bytes;
#endif
}

void entered(const void** from_stack, size_t* from_bytes) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, from_stack, from_bytes);
#else
    (void)from_stack, (void)from_bytes;
#endif
}

[[noreturn]] void to_scheduler() {
    entering(block.scheduler_stack, block.scheduler_bytes);
    _longjmp(block.scheduler, 1);
}

void yield() {
    if (_setjmp(block.fibers[block.current].at) == 0) to_scheduler();
    entered(nullptr, nullptr);
}

void run_fiber() {
    entered(&block.scheduler_stack, &block.scheduler_bytes);
    (*block.body)();
    block.fibers[block.current].done = true;
    ++block.progress;
    to_scheduler();
}

void resume(Fiber& fiber) {
    if (_setjmp(block.scheduler) == 0) {
        entering(fiber.stack.get(), kStackBytes);
        if (fiber.started) _longjmp(fiber.at, 1);
        fiber.started = true;
        setcontext(&fiber.entry);
    }
    entered(nullptr, nullptr);
}

void wait(Barrier& barrier) {
    const u32 generation = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
        ++block.progress;
        return;
    }
    while (barrier.generation == generation) yield();
}

u32 exchange(u32 value, u32 from) {
    Warp& warp = block.warps[block.current / kWarp];
    u32* slots = warp.slots[block.fibers[block.current].exchanges++ % 2];
    slots[block.current % kWarp] = value;
    wait(warp.barrier);
    return slots[from % kWarp];
}

void start_block(u32 threads) {
    if (block.fibers.size() < threads) block.fibers = std::vector<Fiber>(threads);
    block.warps.assign(threads / kWarp, Warp{});
    block.barrier = {threads};
    block.threads = threads;
    for (u32 i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        fiber.started = fiber.done = false, fiber.exchanges = 0;
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.get(), fiber.entry.uc_stack.ss_size = kStackBytes;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, run_fiber, 0);
    }
}

void run_block() {
    for (u32 left = block.threads; left > 0;) {
        const u64 before = block.progress;
        left = 0;
        for (block.current = 0; block.current < block.threads; ++block.current) {
            Fiber& fiber = block.fibers[block.current];
            if (!fiber.done) resume(fiber);
            left += !fiber.done;
        }
        if (block.progress == before) throw std::runtime_error("threads wait at a barrier that others never reach");
    }
}

}  // namespace

void emulate(const Launch& launch, const std::function<void()>& body) {
    block.body = &body;
    for (block.y = 0; block.y < launch.y; ++block.y)
        for (block.x = 0; block.x < launch.x; ++block.x) {
            start_block(launch.threads);
            run_block();
        }
}

u32 thread_index() { return block.current; }
u32 block_index() { return block.x; }
u32 block_index_y() { return block.y; }
void sync_block() { wait(block.barrier); }
void sync_warp() { exchange(0, 0); }
u32 shuffle_xor(u32 value, u32 mask) { return exchange(value, block.current ^ mask); }
u32 shuffle_from(u32 value, u32 lane) { return exchange(value, lane); }

u32 ballot(bool vote) {
    Warp& warp = block.warps[block.current / kWarp];
    const u32* slots = warp.slots[block.fibers[block.current].exchanges % 2];
    exchange(vote, 0);
    u32 mask = 0;
    for (u32 lane = 0; lane < kWarp; ++lane) mask |= slots[lane] << lane;
    return mask;
}

u16 half_of(float value) { return from_float<Float16>(value).bits; }
float value_of_half(u16 bits) { return to_float(Float16{bits}); }

}  // namespace longcat::cuda
