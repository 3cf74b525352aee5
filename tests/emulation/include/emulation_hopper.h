// The end of csrc/cuda/vocabulary_hopper.cuh once more, for a compiler that is not nvcc; hopper.cpp has the models.
#pragma once

#include "hopper.h"

namespace hb {

template <typename... Parameters, typename... Arguments>
void launch_behind(void (*kernel)(Parameters...), unsigned blocks, int threads, int64_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
    emulation::run_grid(
        blocks, threads, shared_bytes, stream, [=] { kernel(static_cast<Parameters>(arguments)...); },
        emulation::kHopperGrid);
}

template <typename... Parameters>
hb_status check_kernel(void (*)(Parameters...), int) {
    return fail_unless(emulation::device() == emulation::kHopperDevice, HB_NO_KERNEL);
}

inline void predecessors_wait() {
    emulation::wait_for_predecessors();
}
inline void successors_may_start() {}

inline unsigned char* tiles_memory() {
    return emulation::shared_memory();
}

inline unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(shared));
}

inline void group_barrier(int number, int threads) {
    emulation::wait_for_group(number, threads);
}

inline void warp_barrier() {
    emulation::exchange("warp.sync", emulation::kAllLanes, 0);
}

template <int Registers>
void release_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "no number of registers");
}
template <int Registers>
void claim_registers() {
    static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "no number of registers");
}

inline void barrier_begin(Barrier* barrier, int arrivals) {
    emulation::begin_barrier(barrier, arrivals);
}
inline void barriers_begun() {
    emulation::publish_barriers();
}
inline void barrier_arrive(Barrier* barrier) {
    emulation::arrive(barrier, 0);
}
inline void barrier_arrive_expecting(Barrier* barrier, int bytes) {
    emulation::arrive(barrier, bytes);
}
inline void barrier_arrive_after_copies(Barrier* barrier) {
    emulation::arrive_after_copies(barrier);
}
inline void barrier_wait(Barrier* barrier, unsigned parity) {
    emulation::wait_for_phase(barrier, parity);
}
inline void bulk_copy(void* to_shared, const void* from, int bytes, Barrier* barrier) {
    emulation::start_bulk_copy(to_shared, from, bytes, barrier);
}

inline void products_begin() {
    emulation::begin_products();
}
inline void products_commit() {
    emulation::commit_products();
}
template <int Count>
void products_wait(float (&)[Count]) {
    emulation::wait_for_products();
}
template <typename T, int Count>
void multiply_rows(T, float (&sums)[Count], const unsigned (&a)[4], uint64_t tile, int add) {
    emulation::start_product([](uint16_t bits) { return to_float(T{bits}); }, sums, Count, a, tile, add != 0);
}

}  // namespace hb
