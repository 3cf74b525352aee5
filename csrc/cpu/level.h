// Which hand-written instruction set variants may run: what serves this CPU best, unless the environment says
// otherwise.
//
// HALFBYTE_CPU_LEVEL names one of the levels below that the CPU has, for tests and for comparisons. It holds for what
// is written by hand and for what the compiler vectorises (clones.h) alike.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define HB_X86 1
// For a function of a level in a file that is compiled for all of them.
#define HB_AVX512 __attribute__((target("avx512f")))
#endif

namespace hb {

// Each holds what the ones before it hold.
enum Level {
    kBaseline,    // anything: what other processors run
    kAvx2,        // AVX2, FMA
    kAvx512,      // AVX-512 F, BW, DQ, VL and VNNI
    kAvx512Bf16,  // and its BF16 products
    kAmx,         // and AMX tiles of bfloat16 and int8, which the system saves and a trial has found right
    kLevelCount
};

// Decided once: a process does not change its mind between two layers.
Level level();

// Whether what kAvx2 and kAvx512 need may run.
bool has_avx2();
bool has_avx512();

// Whether what kAvx512Bf16 needs may run, and VBMI, which some processors of that level lack.
bool has_vbmi();

}  // namespace hb
