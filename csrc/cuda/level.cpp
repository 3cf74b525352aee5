// The CUDA library's answer to which instruction set it runs at: there is one answer.
#include "halfbyte.h"

extern "C" const char* hb_level(void) {
    return "cuda";
}

extern "C" int64_t hb_levels(const char** names, int64_t room) {
    if (names == nullptr || room < 1) return -1;
    names[0] = hb_level();
    return 1;
}
