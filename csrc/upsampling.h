// Dynamic local upsampling (paper 3.5): four stages of norm, bicubic x2, edges, 3 x 3 convolution, on a crop.
//
// conv(up(z) + E) = sum over taps of shift(up(W_tap z)) + conv(E): the products run at low resolution, and conv(E) was
// made once for the image. Maps are planar, [channels][rows][columns].
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "packing.h"

namespace i2f {

struct TokenBox {
    std::int64_t left, top, right, bottom;  // half-open, tokens
};

// conv(E) of one stage over the whole map, in float32 or in int16: of those, kEdgeBlock after the other share a unit.
// The convolution of a crop sees zeros outside: at the crop's outermost pixels the part that came from outside is
// taken off again. s = 2 << stage pixels a token.
struct EdgeMaps {
    const std::int16_t* packed;  // one of the two is null
    const float* exact;
    const std::uint16_t* units;  // of packed, bfloat16 [ceil(size / kEdgeBlock)]
    const float* middles;        // of packed, [9][out]: what its numbers are relative to, in each part and channel
    // In one array: all [out][s rows][s columns], above [out][rows][s columns], below [same], before
    // [out][columns][s rows], behind [same], then the four corners [out][rows][columns]: above before, above behind,
    // below before, below behind. rows, columns in tokens; index k of `above` and `before` is for a crop that begins
    // with token k, of `below` and `behind` for one that ends with it. Each part, the corners being one, is filled up
    // with zeros to whole blocks.
};

constexpr std::int64_t kEdgeBlock = 32;

std::int64_t edge_map_size(std::int64_t out, std::int64_t rows, std::int64_t columns, int stage);

class Upsampling {
public:
    // widths: d, u1, u2, u3, 1. Throws std::bad_alloc.
    Upsampling(const GetWeight& get, const std::int64_t (&widths)[5], bool per_pixel, const Kernels& kernels);

    // tokens [rows * columns, d] -> out [16 box rows, 16 box columns]
    void run(const float* tokens, std::int64_t rows, std::int64_t columns, const TokenBox& box,
             const EdgeMaps (&edges)[4], float* out) const;

    std::int64_t outputs(int stage) const { return widths_[stage + 1]; }
    std::size_t bytes() const { return store_.bytes(); }

private:
    struct Stage {
        const float* taps;  // [out][9][in], pairs where the path has them
        const float* bias;  // [out]
        const float* norm_weight;
        const float* norm_bias;
    };
    void stage(int index, const float* z, std::int64_t height, std::int64_t width, const double* sums,
               const TokenBox& box, std::int64_t rows, std::int64_t columns, const EdgeMaps& edges, float* out,
               double* out_sums, float* memory, int workers) const;
    std::int64_t strip_rows(int index, std::int64_t height, std::int64_t width) const;
    std::int64_t scratch_floats(int index, std::int64_t height, std::int64_t width) const;

    const Kernels& kernels_;
    std::int64_t widths_[5];
    bool per_pixel_;
    Store store_;
    Stage stages_[4]{};
};

}  // namespace i2f
