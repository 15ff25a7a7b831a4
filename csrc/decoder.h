// One click: reference mask and encoded image in, logits out. The whole decoder of the paper's Figure 2 over packed
// weights; see inter2former/nn for what it computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "hmoe.h"
#include "packing.h"
#include "prompt.h"
#include "upsampling.h"

namespace i2f {

struct DecoderSizes {
    std::int64_t width;      // d
    std::int64_t attention;  // a
    std::int64_t bits;
    std::int64_t blocks;
    std::int64_t prompt[3];
    std::int64_t up[4];
    bool per_pixel_norm;
    bool constant_is_edge;  // the "released" edge rule
    float low_threshold;
};

// What is computed once an image, and the tables of rotary positions for its size.
struct EncodedImage {
    std::int64_t rows, columns;  // tokens
    const float* tokens;         // [rows * columns, d]
    EdgeMaps edges[4];           // coarse to fine
    const float* cosines;        // [rows * columns, a / 2]
    const float* sines;
};

class Decoder {
public:
    Decoder(const GetWeight& get, const DecoderSizes& sizes, std::vector<Hmoe> experts, const Kernels& kernels);

    // Thread-safe; results do not depend on the number of threads. Throws std::bad_alloc.
    // state [16 rows, 16 columns] 0 to 4, box from prompt_box -> low [rows, columns]; returns the box that is upsampled.
    TokenBox locate(const EncodedImage& image, const std::uint8_t* state, std::ptrdiff_t row_stride, const Box& box,
                    float* low, float* tokens) const;

    // tokens as `locate` left them -> logits inside the box, [16 box rows, 16 box columns]
    void draw(const EncodedImage& image, const float* tokens, const TokenBox& box, float* logits) const {
        upsampling_.run(tokens, image.rows, image.columns, box, image.edges, logits);
    }

    const DecoderSizes& sizes() const { return sizes_; }
    const Kernels& kernels() const { return kernels_; }
    std::size_t bytes() const;

private:
    struct Block {
        const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
        LinearWeights qkv, proj, code_proj, book;
    };
    struct Pass;
    void attention(const Block& block, Pass& pass) const;

    const Kernels& kernels_;
    DecoderSizes sizes_;
    Store store_;
    Prompt prompt_;
    std::vector<Block> blocks_;
    std::vector<Hmoe> experts_;
    LinearWeights low_[4]{};
    Upsampling upsampling_;
};

// The tight box of what is not possible background, rounded outwards to tokens and one token wider; everything when
// there is nothing. Returns false when a state is above 4.
bool prompt_box(const Kernels& kernels, const std::uint8_t* state, std::ptrdiff_t row_stride, std::int64_t height,
                std::int64_t width, Box& box);

}  // namespace i2f
