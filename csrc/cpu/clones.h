// HB_CLONES: compile a function for several instruction sets; the loader picks the widest that this CPU has.
//
// Only for functions whose loops the compiler vectorises; what they call must be HB_INLINE so that it is compiled with
// them. Off under sanitizers (the choice runs before their runtime is up) and for compilers other than GCC on x86-64.
#pragma once

#define HB_INLINE inline __attribute__((always_inline))
// A loop whose sums must stay in registers is a function of its own: inlined, its neighbours take them.
#define HB_NOINLINE __attribute__((noinline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(HB_NO_CLONES)
#define HB_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HB_CLONES
#endif
