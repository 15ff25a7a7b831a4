// 3 x 3 convolution of a whole map with padding 1, in float32, for maps of many channels: Winograd's F(4 x 4, 3 x 3)
// needs a quarter of the multiplications. Its error is a few units in the seventh digit of the
// largest term, about six times that of the plain sum.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing.h"
#include "thread_pool.h"

namespace i2f {

// Maps are [height][width][channels]; `scale` and `add` may be null.
struct ConvolutionCall {
    const float* x;
    std::int64_t height, width;
    const float *scale, *shift;  // [in]: convolve silu(scale x + shift) instead of x
    const float* add;            // as out: added to the result
    bool silu;                   // applied at last
    float* out;                  // must not overlap the others
    Lane lane = Lane::image;
};

class Convolution {
public:
    // weight [out, in, 3, 3], bias [out], contiguous. Throws std::bad_alloc.
    Convolution(std::int64_t in, std::int64_t out, const float* weight, const float* bias, const Kernels& kernels);

    // sums: of the result and of its squares. The same bits whatever the threads. Throws std::bad_alloc.
    void run(const ConvolutionCall& call, double (&sums)[2]) const;

    std::int64_t inputs() const { return in_; }
    std::int64_t outputs() const { return out_; }
    const Kernels& kernels() const { return kernels_; }
    std::size_t bytes() const { return store_.bytes(); }

private:
    const Kernels& kernels_;
    std::int64_t in_, out_;
    Store store_;
    LinearWeights points_[36];
    const float* bias_;
};

}  // namespace i2f
