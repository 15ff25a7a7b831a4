// What score.py and level.py say of masks at several levels of one map of logits; those files are the twins.
//
// Runs on the caller's thread: it takes less than waking others would.
#pragma once

#include <cstddef>
#include <cstdint>

namespace i2f {

constexpr int kMaxLevels = 8;
constexpr int kEvidence = 10;  // score.EVIDENCE
constexpr int kShape = 6;      // what level.FEATURES has besides, but for the level itself

struct SeenClick {
    std::int64_t row, column;
    bool positive;
};

// A map of logits and what is known of it.
struct Seen {
    const float* logits;  // [rows, columns]
    std::int64_t rows, columns;
    const SeenClick* clicks;
    std::int64_t count;
    const std::uint8_t* previous;  // [rows, columns] of 0 and 1, or null
    const float* links;            // [4, kGrid] of random_walk.h, rows and columns at most kCells; or null
};

// levels rising -> found[n]: whether the mask at a level holds anything; numbers [levels, kEvidence], and
// [levels, kEvidence + kShape] with links. Throws std::bad_alloc.
void describe(const Seen& seen, const float* levels, int n_levels, bool* found, double* numbers);

}  // namespace i2f
