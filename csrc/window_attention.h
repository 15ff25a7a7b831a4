// Attention of the image encoder inside windows of its map of tokens (paper 3.1), of which the projections are not part.
// No copies of queries, keys and values by windows, and no matrix of scores. The twin is Attention of nn/encoder.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing.h"

namespace i2f {

// A map of height x width tokens; the first window begins `lead` rows above and columns left of it.
struct WindowCall {
    const float* qkv;      // [height * width][3 heads a]: queries, keys and values of all heads
    const float* padding;  // [3 heads a]: of every place outside of the map
    std::int64_t height, width;
    std::int64_t lead;  // less than the window
    float* out;         // [height * width][heads a]
};

class WindowAttention {
public:
    // cosines, sines [side * side][a / 2]: of a window's places, for adjacent channels. Throws std::bad_alloc.
    WindowAttention(std::int64_t side, std::int64_t heads, std::int64_t a, const float* cosines, const float* sines,
                    const Kernels& kernels);

    // The same bits whatever the threads. Throws std::bad_alloc.
    void run(const WindowCall& call) const;

    std::int64_t heads() const { return heads_; }
    std::int64_t head_width() const { return a_; }
    std::int64_t side() const { return side_; }
    const Kernels& kernels() const { return kernels_; }
    std::size_t bytes() const { return store_.bytes(); }

private:
    void window(const WindowCall& call, std::int64_t top, std::int64_t left, std::int64_t head, float* scratch) const;

    const Kernels& kernels_;
    std::int64_t side_, heads_, a_;
    Store store_;
    const float *cosines_, *sines_;
};

}  // namespace i2f
