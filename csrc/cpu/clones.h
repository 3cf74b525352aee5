// HB_CLONES: one function compiled for the instruction sets of several levels; a call runs what level() allows.
//
// Only for functions whose loops the compiler vectorises; what they call must be HB_INLINE so that it is compiled with
// them.
#pragma once

#include "level.h"

#define HB_INLINE inline __attribute__((always_inline))
// A loop whose sums must stay in registers is a function of its own: inlined, its neighbours take them.
#define HB_NOINLINE __attribute__((noinline))
// Before a loop over an array that is to stay in registers: where GCC 12 unrolls it late, it stores the array in every
// round of the loop around it.
#ifdef __clang__
#define HB_UNROLL _Pragma("unroll")
#else
#define HB_UNROLL _Pragma("GCC unroll 16")
#endif

namespace hb {

namespace {

template <auto Body>
struct Clones;

template <typename Result, typename... Args, Result (*Body)(Args...)>
struct Clones<Body> {
    static Result baseline(Args... args) { return Body(args...); }
#ifdef HB_X86
    __attribute__((target("avx2,fma"))) static Result avx2(Args... args) { return Body(args...); }
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) static Result avx512(Args... args) {
        return Body(args...);
    }
#endif
    static auto best() {
#ifdef HB_X86
        if (has_avx512()) return avx512;
        if (has_avx2()) return avx2;
#endif
        return baseline;
    }
    static Result run(Args... args) {
        static const auto chosen = best();
        return chosen(args...);
    }
};

}  // namespace

}  // namespace hb

// Clones<body>::run is the function of a body by itself, as an instance of a template is one.
// HB_CLONES(result, name, (parameters)) { body } defines the function `name`, of one file.
#define HB_CLONES(result, name, parameters)                        \
    HB_INLINE result name##_body parameters;                       \
    constexpr result(*name) parameters = Clones<name##_body>::run; \
    HB_INLINE result name##_body parameters
