/* halfbyte.h must be plain C: this file only has to compile, and to agree with the library on the sizes. */
#include "halfbyte.h"

_Static_assert(sizeof(hb_call) == 56, "hb_call: seven fields of eight bytes");

int header_abi_version(void) {
    return HB_ABI_VERSION;
}
