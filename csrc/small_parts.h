// The small parts of a mask, as inter2former/small_parts.py defines them; that file is its twin.
//
// Runs on the caller's thread: it takes less than waking others would.
#pragma once

#include <cstddef>
#include <cstdint>

namespace i2f {

struct SmallParts {
    bool inside;   // islands of the mask, else holes in it
    double share;
    float least;   // size of the logit of what changes its side
};

// logits and out [rows, columns]; spoken [rows, columns] holds 0 and 1. False, and nothing is written, where no part is
// small. Throws std::bad_alloc.
bool flip_small_parts(const float* logits, std::int64_t rows, std::int64_t columns, const std::uint8_t* spoken,
                      std::ptrdiff_t spoken_stride, const SmallParts& settings, float* out);

}  // namespace i2f
