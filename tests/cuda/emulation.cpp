#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
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

struct Copy {
    void* to;
    const void* from;  // null: zeros
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    ucontext_t entry;
    jmp_buf at;
    bool started, done;
    u32 exchanges;
    std::deque<std::vector<Copy>> groups;  // of copies on the way, the newest still open
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<u8> memory;  // shared, dynamic
    Barrier barrier{0};
    u32 x = 0, y = 0, threads = 0, current = 0;
};

// Those that run at once, and the one of them whose turn it is. Fibers enter by ucontext and switch by jumps, which
// cost no system call.
struct Running {
    std::vector<Block> blocks{1};
    Block* block = nullptr;
    u32 grid = 0;
    u64 progress = 0;
    const std::function<void()>* body = nullptr;
    jmp_buf scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_bytes = 0;
} running;

Fiber& this_fiber() { return running.block->fibers[running.block->current]; }

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
    entering(running.scheduler_stack, running.scheduler_bytes);
    _longjmp(running.scheduler, 1);
}

void yield() {
    if (_setjmp(this_fiber().at) == 0) to_scheduler();
    entered(nullptr, nullptr);
}

void run_fiber() {
    entered(&running.scheduler_stack, &running.scheduler_bytes);
    (*running.body)();
    this_fiber().done = true;
    ++running.progress;
    to_scheduler();
}

void resume(Fiber& fiber) {
    if (_setjmp(running.scheduler) == 0) {
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
        ++running.progress;
        return;
    }
    while (barrier.generation == generation) yield();
}

u32 exchange(u32 value, u32 from) {
    Block& block = *running.block;
    Warp& warp = block.warps[block.current / kWarp];
    u32* slots = warp.slots[this_fiber().exchanges++ % 2];
    slots[block.current % kWarp] = value;
    wait(warp.barrier);
    return slots[from % kWarp];
}

void start_block(Block& block, const Launch& launch) {
    if (block.fibers.size() < launch.threads) block.fibers = std::vector<Fiber>(launch.threads);
    block.warps.assign(launch.threads / kWarp, Warp{});
    block.memory.assign(launch.shared_bytes + 16, 0xff);
    block.barrier = {launch.threads};
    block.threads = launch.threads;
    for (u32 i = 0; i < launch.threads; ++i) {
        Fiber& fiber = block.fibers[i];
        fiber.started = fiber.done = false, fiber.exchanges = 0, fiber.groups.assign(1, {});
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = fiber.stack.get(), fiber.entry.uc_stack.ss_size = kStackBytes;
        fiber.entry.uc_link = nullptr;
        makecontext(&fiber.entry, run_fiber, 0);
    }
}

// Each thread that is not done gets a turn; how many still are not.
u32 take_turns(Block& block) {
    u32 left = 0;
    running.block = &block;
    for (block.current = 0; block.current < block.threads; ++block.current) {
        Fiber& fiber = block.fibers[block.current];
        if (!fiber.done) resume(fiber);
        left += !fiber.done;
    }
    return left;
}

// The first `count` blocks, to their ends.
void run_blocks(u32 count) {
    for (u32 left = 1; left > 0;) {
        const u64 before = running.progress;
        left = 0;
        for (u32 i = 0; i < count; ++i) left += take_turns(running.blocks[i]);
        if (running.progress == before) throw std::runtime_error("threads wait at a barrier that others never reach");
    }
}

}  // namespace

void emulate(const Launch& launch, const std::function<void()>& body) {
    const u32 together = launch.cooperative ? launch.x * launch.y : 1;
    running.body = &body, running.grid = launch.x;
    while (running.blocks.size() < together) running.blocks.emplace_back();
    u32 ready = 0;
    for (u32 y = 0; y < launch.y; ++y)
        for (u32 x = 0; x < launch.x; ++x) {
            Block& block = running.blocks[ready++];
            block.x = x, block.y = y;
            start_block(block, launch);
            if (ready == together) run_blocks(ready), ready = 0;
        }
}

u32 thread_index() { return running.block->current; }
u32 block_index() { return running.block->x; }
u32 block_index_y() { return running.block->y; }
u32 grid_size() { return running.grid; }
void sync_block() { wait(running.block->barrier); }
void sync_warp() { exchange(0, 0); }
u32 shuffle_xor(u32 value, u32 mask) { return exchange(value, thread_index() ^ mask); }
u32 shuffle_from(u32 value, u32 lane) { return exchange(value, lane); }

u32 ballot(bool vote) {
    Warp& warp = running.block->warps[thread_index() / kWarp];
    const u32* slots = warp.slots[this_fiber().exchanges % 2];
    exchange(vote, 0);
    u32 mask = 0;
    for (u32 lane = 0; lane < kWarp; ++lane) mask |= slots[lane] << lane;
    return mask;
}

u8* dynamic_shared() {
    return reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(running.block->memory.data()) + 15) / 16 * 16);
}

void add_release(u32* counter, u32 value) { *counter += value, ++running.progress; }

void wait_for(const u32* counter, u32 goal) {
    while (*counter < goal) yield();
}

void start_copy(void* to, const void* from, bool exists) {
    this_fiber().groups.back().push_back({to, exists ? from : nullptr});
}

void close_group() { this_fiber().groups.emplace_back(); }

void wait_groups(int left) {
    auto& groups = this_fiber().groups;
    for (; groups.size() > size_t(left) + 1; groups.pop_front())
        for (const Copy& copy : groups.front()) {
            std::memset(copy.to, 0, 16);
            if (copy.from != nullptr) std::memcpy(copy.to, copy.from, 16);
        }
}

void load_matrices(u32 (&to)[4], const void* from) {
    const u32 lane = lane_index();
    for (u32 matrix = 0; matrix < 4; ++matrix) {
        const auto address = u64(reinterpret_cast<uintptr_t>(from));
        const u32 low = exchange(u32(address), matrix * 8 + lane / 4);
        const u32 high = exchange(u32(address >> 32), matrix * 8 + lane / 4);
        std::memcpy(&to[matrix], reinterpret_cast<const u8*>(u64(high) << 32 | low) + lane % 4 * 4, 4);
    }
}

// By the figures of m16n8k16 in the PTX ISA: thread 4 g + q has, of row g and then g + 8, depths 2 q and 2 q + 1, then
// those 8 further; of column g the same depths; of the sums columns 2 q and 2 q + 1 of row g, then of row g + 8.
void mma_bfloat16(float (&sums)[4], const u32 (&rows)[4], u32 column0, u32 column1) {
    const u32 own[] = {rows[0], rows[1], rows[2], rows[3], column0, column1};
    u32 all[6][kWarp];
    for (int i = 0; i < 6; ++i) {
        const u32* slots = running.block->warps[thread_index() / kWarp].slots[this_fiber().exchanges % 2];
        exchange(own[i], 0);
        std::memcpy(all[i], slots, sizeof all[i]);
    }
    const auto element = [](u32 pair, int k) { return float_of(k % 2 == 0 ? pair << 16 : pair & 0xffff0000u); };
    for (int i = 0; i < 4; ++i) {
        const int row = int(lane_index()) / 4 + i / 2 * 8, column = int(lane_index()) % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const int q = k % 8 / 2;
            sums[i] +=
                element(all[row / 8 + k / 8 * 2][row % 8 * 4 + q], k) * element(all[4 + k / 8][column * 4 + q], k);
        }
    }
}

u16 half_of(float value) { return from_float<Float16>(value).bits; }
float value_of_half(u16 bits) { return to_float(Float16{bits}); }

}  // namespace longcat::cuda
