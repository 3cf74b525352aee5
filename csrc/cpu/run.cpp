// Several calls in one: the steps of a layer one after the other, on threads that stay together from the first to the
// last. Each step is checked by its own entry, just before it runs.
#include "checks.h"
#include "halfbyte.h"
#include "pool.h"

namespace hb {
namespace {

template <typename Args>
hb_status one(hb_status (*entry)(const Args*), const hb_step& step) {
    HB_REQUIRE(fail_unless(step.count == 1, HB_BAD_OPTION));
    return entry(static_cast<const Args*>(step.args));
}

hb_status run(const hb_step& step) {
    switch (step.entry) {
        case HB_STEP_LINEAR4:
            return hb_linear4_group(static_cast<const hb_linear4_args*>(step.args), step.count);
        case HB_STEP_LINEAR8:
            return hb_linear8_group(static_cast<const hb_linear8_args*>(step.args), step.count);
        case HB_STEP_LINEAR4_INT8:
            return one(hb_linear4_int8, step);
        case HB_STEP_PAGED_ATTENTION:
            return one(hb_paged_attention, step);
        case HB_STEP_CACHE_WRITE:
            return one(hb_cache_write, step);
        case HB_STEP_RMS_NORM:
            return one(hb_rms_norm, step);
        case HB_STEP_SWIGLU:
            return one(hb_swiglu, step);
        case HB_STEP_ROTARY:
            return one(hb_rotary, step);
        case HB_STEP_ADD:
            return one(hb_add, step);
        default:
            return HB_BAD_OPTION;
    }
}

}  // namespace
}  // namespace hb

extern "C" hb_status hb_run(const hb_step* steps, int64_t count, int64_t threads) {
    using namespace hb;
    HB_REQUIRE(fail_unless(threads >= 1 && threads <= HB_MAX_THREADS, HB_BAD_THREADS));
    HB_REQUIRE(fail_unless(count >= 0 && count <= HB_MAX_ELEMENTS, HB_BAD_SHAPE));
    HB_REQUIRE(check_tensor(steps, count, alignof(hb_step)));
    hb_status status = HB_OK;
    auto all = [&] {
        for (int64_t i = 0; i < count && status == HB_OK; ++i) status = run(steps[i]);
    };
    keep_together(threads, all);
    return status;
}
