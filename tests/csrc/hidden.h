// Memory whose parts can be made unreadable: what must not be read.
#pragma once

#include <sys/mman.h>

#include <algorithm>

#include "testing.h"

namespace testing {

// A copy at the end of pages of its own, which may not be touched any more once `hide` is called.
template <typename T>
class Hidden {
  public:
    explicit Hidden(const std::vector<T>& values) : bytes_(values.size() * sizeof(T)) {
        const size_t page = 4096;
        all_ = (bytes_ + page - 1) / page * page;
        memory_ = mmap(nullptr, std::max(all_, page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory_ == MAP_FAILED) abort();
        if (bytes_ > 0) memcpy(data(), values.data(), bytes_);
    }
    ~Hidden() { munmap(memory_, std::max<size_t>(all_, 4096)); }
    Hidden(const Hidden&) = delete;
    Hidden& operator=(const Hidden&) = delete;
    T* data() const { return reinterpret_cast<T*>(static_cast<char*>(memory_) + (all_ - bytes_)); }
    // Of `count` equal parts, makes the pages that lie whole in one of `parts` unreadable.
    int64_t hide(int64_t count, const std::vector<int64_t>& parts) {
        int64_t hidden = 0;
        const int64_t part_bytes = static_cast<int64_t>(bytes_) / count, page = 4096;
        const int64_t start = static_cast<int64_t>(all_ - bytes_);
        for (const int64_t part : parts) {
            const int64_t from = ceil_div(start + part * part_bytes, page) * page;
            const int64_t to = (start + (part + 1) * part_bytes) / page * page;
            if (from >= to) continue;
            if (mprotect(static_cast<char*>(memory_) + from, static_cast<size_t>(to - from), PROT_NONE) != 0) abort();
            hidden += to - from;
        }
        return hidden;
    }

  private:
    size_t bytes_, all_;
    void* memory_;
};

}  // namespace testing
