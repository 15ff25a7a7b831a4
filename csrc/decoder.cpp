#include "decoder.h"

#include <algorithm>
#include <cmath>

#include "thread_pool.h"

namespace i2f {
namespace {

constexpr std::int64_t kToken = 16;
constexpr std::uint8_t kPossibleBackground = 1;

thread_local Arena pass_arena;
thread_local Arena line_arena;

GetWeight under(const GetWeight& get, std::string prefix) {
    return [&get, prefix = std::move(prefix)](const std::string& name, const std::vector<std::int64_t>& shape) {
        return get(prefix + name, shape);
    };
}

struct Widths {
    std::int64_t values[5];
};

Widths prompt_widths(const DecoderSizes& s) { return {{5, s.prompt[0], s.prompt[1], s.prompt[2], s.width}}; }
Widths up_widths(const DecoderSizes& s) { return {{s.up[0], s.up[1], s.up[2], s.up[3], 1}}; }

// Hands out pieces of working memory.
class Pieces {
public:
    explicit Pieces(std::byte* memory) : memory_(memory) {}

    template <class T>
    T* take(std::int64_t count) {
        std::byte* piece = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += round_up(static_cast<std::size_t>(count) * sizeof(T), kAlignment);
        return reinterpret_cast<T*>(piece);
    }
    std::size_t used() const { return used_; }

private:
    std::byte* memory_;
    std::size_t used_ = 0;
};

}  // namespace

// Working memory of one click.
struct Decoder::Pass {
    const EncodedImage* image;
    int workers;
    std::int64_t n, d, a, padded;  // tokens, widths; d rounded up to whole panels
    const std::uint8_t* edge;      // [n]
    float* x;                      // [n, d]
    float* added;                  // [n, d] what the experts add to x; not yet in it
    bool pending;                  // whether `added` still has to be added
    float* normed;                 // [n, d]
    float* queries;                // [n, a] scaled; turned where edge
    float* keys;                   // [ceil(n / P)][a][P], pairs where the path has them
    float* values;                 // [ceil(a / P)][n][P]
    float* paired_values;          // [ceil(a / P)][ceil(n / 2)][P], where the path has pairs
    std::int32_t* codes;           // [n]
    float* counts;                 // [2^bits]
    float* sums;                   // [ceil(a / P)][2^bits][P]
    float* paired_sums;            // [ceil(a / P)][2^bits / 2][P], where the path has pairs
    std::int32_t* order;           // [n] edge tokens, then the others
    float* scratch;                // a worker's own
    std::int64_t scratch_floats;

    void lay_out(Pieces& pieces, const Decoder& decoder) {
        const std::int64_t P = decoder.kernels_.panel;
        const std::int64_t n_codes = std::int64_t{1} << decoder.sizes_.bits;
        added = pieces.take<float>(n * d);
        normed = pieces.take<float>(n * d);
        queries = pieces.take<float>(n * a);
        keys = pieces.take<float>(round_to(n, P) * a);
        values = pieces.take<float>(round_to(a, P) * n);
        const bool pairs = decoder.kernels_.pairs;
        paired_values = pieces.take<float>(pairs ? round_to(a, P) * words_of(n, true) : 0);
        paired_sums = pieces.take<float>(pairs ? round_to(a, P) * n_codes / 2 : 0);
        codes = pieces.take<std::int32_t>(n);
        counts = pieces.take<float>(n_codes);
        sums = pieces.take<float>(round_to(a, P) * n_codes);
        order = pieces.take<std::int32_t>(n);
        const std::int64_t rows = kMaxRows * (padded + round_to(3 * a, P) + round_to(decoder.sizes_.bits, P));
        const std::int64_t queries_floats =
            kQueryRows * (2 * round_to(a, P) + 2 * padded) +
            std::max(attend_floats(a, P), bsq_floats(a, decoder.sizes_.bits, P));
        std::int64_t low = 0;
        for (const LinearWeights& layer : decoder.low_) low += round_to(layer.outputs, P);
        scratch_floats = round_to(std::max({rows, queries_floats, kMaxRows * low}) + 64, 16);
        scratch = pieces.take<float>(scratch_floats * workers);
    }
    float* scratch_of(int worker) const { return scratch + worker * scratch_floats; }

    // Rows first .. first + count - 1 of x, with what was pending.
    void settle(std::int64_t first, std::int64_t count) const {
        if (!pending) return;
        float* to = x + first * d;
        const float* from = added + first * d;
        for (std::int64_t k = 0; k < count * d; ++k) to[k] += from[k];
    }
};

Decoder::Decoder(const GetWeight& get, const DecoderSizes& sizes, std::vector<Hmoe> experts, const Kernels& kernels)
    : kernels_(kernels),
      sizes_(sizes),
      prompt_(under(get, "prompt."), prompt_widths(sizes).values, kernels),
      experts_(std::move(experts)),
      upsampling_(under(get, "upsampling."), up_widths(sizes).values, sizes.per_pixel_norm, kernels) {
    const std::int64_t d = sizes.width;
    const std::int64_t a = sizes.attention;
    const std::int64_t bits = sizes.bits;
    const std::int64_t P = kernels.panel;
    // Even channels first: a rotary pair then lies half a width apart. Scores are sums over channels in any order.
    const auto channel = [a](std::int64_t j) { return j < a / 2 ? 2 * j : 2 * (j - a / 2) + 1; };
    const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a)));
    for (std::int64_t i = 0; i < sizes.blocks; ++i) {
        const GetWeight of = under(get, "blocks." + std::to_string(i) + ".");
        Block block{};
        block.norm1_weight = store_.copy(of("norm1.weight", {d}), d, P);
        block.norm1_bias = store_.copy(of("norm1.bias", {d}), d, P);
        block.norm2_weight = store_.copy(of("norm2.weight", {d}), d, P);
        block.norm2_bias = store_.copy(of("norm2.bias", {d}), d, P);
        const float* qkv = of("attention.qkv.weight", {3 * a, d});
        const float* qkv_bias = of("attention.qkv.bias", {3 * a});
        const auto row = [&](std::int64_t j) { return j < 2 * a ? j / a * a + channel(j % a) : j; };
        block.qkv = store_.linear(
            d, 3 * a, kernels, [&](std::int64_t j, std::int64_t k) { return (j < a ? scale : 1.0F) * qkv[row(j) * d + k]; },
            [&](std::int64_t j) { return (j < a ? scale : 1.0F) * qkv_bias[row(j)]; });
        const float* proj = of("attention.proj.weight", {d, a});
        const float* proj_bias = of("attention.proj.bias", {d});
        block.proj = store_.linear(
            a, d, kernels, [&](std::int64_t j, std::int64_t k) { return proj[j * a + k]; },
            [&](std::int64_t j) { return proj_bias[j]; });
        const float* code = of("attention.code_proj.weight", {bits, a});
        const float* code_bias = of("attention.code_proj.bias", {bits});
        block.code_proj = store_.linear(
            a, bits, P, [&](std::int64_t j, std::int64_t k) { return code[j * a + channel(k)]; },
            [&](std::int64_t j) { return code_bias[j]; });
        const float* book = of("attention.codebook", {2 * bits, a});
        block.book = store_.linear(
            a, 2 * bits, P, [&](std::int64_t j, std::int64_t k) { return book[j * a + channel(k)]; },
            [](std::int64_t) { return 0.0F; });
        blocks_.push_back(block);
    }
    const Widths widths = up_widths(sizes);
    for (std::int64_t i = 0; i < 4; ++i) {
        const std::int64_t in = widths.values[i];
        const std::int64_t out = widths.values[i + 1];
        const std::string name = "upsampling.low." + std::to_string(i);
        const float* w = get(name + ".weight", {out, in, 1, 1});
        const float* b = get(name + ".bias", {out});
        low_[i] = store_.linear(
            in, out, P, [&](std::int64_t j, std::int64_t k) { return w[j * in + k]; },
            [&](std::int64_t j) { return b[j]; });
    }
}

std::size_t Decoder::bytes() const {
    std::size_t sum = store_.bytes() + prompt_.bytes() + upsampling_.bytes();
    for (const Hmoe& experts : experts_) sum += experts.bytes();
    return sum;
}

bool prompt_box(const Kernels& kernels, const std::uint8_t* state, std::ptrdiff_t row_stride, std::int64_t height,
                std::int64_t width, Box& box) {
    const std::size_t size = round_up(static_cast<std::size_t>(width), kAlignment);
    auto* low = reinterpret_cast<std::uint8_t*>(line_arena.get(4 * size));
    std::uint8_t* high = low + size;
    std::uint8_t* row_low = high + size;
    std::uint8_t* row_high = row_low + size;
    std::fill_n(low, width, kPossibleBackground);
    std::fill_n(high, width, kPossibleBackground);
    std::int64_t top = -1;
    std::int64_t bottom = -1;
    // By bands of a token: rows are rounded to tokens anyway.
    for (std::int64_t band = 0; band < height; band += kToken) {
        std::fill_n(row_low, width, kPossibleBackground);
        std::fill_n(row_high, width, kPossibleBackground);
        for (std::int64_t y = band; y < std::min(band + kToken, height); ++y) {
            kernels.min_max(state + y * row_stride, width, row_low, row_high);
        }
        std::uint8_t different = 0;
        for (std::int64_t x = 0; x < width; ++x) different = static_cast<std::uint8_t>(different | (row_low[x] ^ row_high[x]));
        if (different == 0) continue;
        if (top < 0) top = band;
        bottom = band + kToken;
        kernels.min_max(row_low, width, low, high);
        kernels.min_max(row_high, width, low, high);
    }
    if (top < 0) {
        box = {0, 0, width, height};
        return true;
    }
    std::int64_t left = 0;
    while (low[left] == high[left]) ++left;
    std::int64_t right = width - 1;
    while (low[right] == high[right]) --right;
    box = {std::max<std::int64_t>(left / kToken * kToken - kToken, 0), std::max<std::int64_t>(top - kToken, 0),
           std::min((right / kToken + 2) * kToken, width), std::min(bottom + kToken, height)};
    return *std::max_element(high, high + width) <= 4;
}

// x += proj(attention(norm1 x)); normed = norm2 x
void Decoder::attention(const Block& block, Pass& pass) const {
    const std::int64_t P = kernels_.panel;
    const std::int64_t n = pass.n;
    const std::int64_t d = pass.d;
    const std::int64_t a = pass.a;
    const std::int64_t half = a / 2;
    const std::int64_t bits = sizes_.bits;
    const std::int64_t n_codes = std::int64_t{1} << bits;
    const bool pairs = kernels_.pairs;
    const EncodedImage& image = *pass.image;

    for_items(blocks_of(n, kMaxRows), pass.workers, [&](std::int64_t item, int worker) {
        const std::int64_t first = item * kMaxRows;
        const std::int64_t count = std::min(kMaxRows, n - first);
        float* rows = pass.scratch_of(worker);
        float* qkv = rows + kMaxRows * pass.padded;
        const std::int64_t qkv_stride = round_to(3 * a, P);
        float* code = qkv + kMaxRows * qkv_stride;
        const std::int64_t code_stride = round_to(bits, P);
        pass.settle(first, count);
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(pass.x + (first + i) * d, d, rows + i * pass.padded);
        kernels_.norm(rows, pass.padded, count, d, block.norm1_weight, block.norm1_bias);
        kernels_.linear(block.qkv, rows, pass.padded, count, Finish::plain, qkv, qkv_stride);
        kernels_.linear(block.code_proj, qkv + a, qkv_stride, count, Finish::plain, code, code_stride);
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t t = first + i;
            const float* q = qkv + i * qkv_stride;
            const float* k = q + a;
            const float* v = k + a;
            std::int32_t number = 0;
            for (std::int64_t j = 0; j < bits; ++j) number = 2 * number + (code[i * code_stride + j] >= 0.0F ? 1 : 0);
            pass.codes[t] = number;
            const float* cosine = image.cosines + t * half;
            const float* sine = image.sines + t * half;
            float* query = pass.queries + t * a;
            float* key = pass.keys + t / P * P * words_of(a, pairs) + t % P;
            for (std::int64_t j = 0; j < half; ++j) {
                put(key, P, j, k[j] * cosine[j] + k[half + j] * sine[j], pairs);
                put(key, P, half + j, k[half + j] * cosine[j] - k[j] * sine[j], pairs);
            }
            if (pass.edge[t] != 0) {
                for (std::int64_t j = 0; j < half; ++j) {
                    query[j] = q[j] * cosine[j] + q[half + j] * sine[j];
                    query[half + j] = q[half + j] * cosine[j] - q[j] * sine[j];
                }
            } else {
                std::copy_n(q, a, query);
            }
            for (std::int64_t c = 0; c < a; c += P) {
                float* to = pass.values + (c * n + t * P);
                const std::int64_t some = std::min(P, a - c);
                std::copy_n(v + c, some, to);
                std::fill_n(to + some, P - some, 0.0F);
                if (!pairs) continue;
                // Two tokens share a word, always of one block: kMaxRows is even.
                float* paired = pass.paired_values + c * words_of(n, true) + t / 2 * P;
                for (std::int64_t j = 0; j < some; ++j) put_half(paired + j, P, t % 2, v[c + j]);
            }
        }
    });

    std::fill_n(pass.counts, n_codes, 0.0F);
    std::fill_n(pass.sums, round_to(a, P) * n_codes, 0.0F);
    for (std::int64_t t = 0; t < n; ++t) {
        const std::int64_t c = pass.codes[t];
        pass.counts[c] += 1.0F;
        for (std::int64_t j = 0; j < a; j += P) {
            float* to = pass.sums + j * n_codes + c * P;
            const float* from = pass.values + j * n + t * P;
            for (std::int64_t l = 0; l < P; ++l) to[l] += from[l];
        }
    }

    if (pairs) {
        for (std::int64_t j = 0; j < a; j += P) {
            for (std::int64_t c = 0; c < n_codes; ++c) {
                const float* from = pass.sums + j * n_codes + c * P;
                float* to = pass.paired_sums + j * n_codes / 2 + c / 2 * P;
                for (std::int64_t l = 0; l < P; ++l) put_half(to + l, P, c % 2, from[l]);
            }
        }
    }

    const std::int64_t n_edge = std::count_if(pass.edge, pass.edge + n, [](std::uint8_t e) { return e != 0; });
    const KeyValues keys{a, n, pass.keys, pairs ? pass.paired_values : pass.values};
    const CodeValues codes{a, bits, block.book, pass.counts, pairs ? pass.paired_sums : pass.sums};
    const std::int64_t edge_items = blocks_of(n_edge, kQueryRows);
    for_items(edge_items + blocks_of(n - n_edge, kQueryRows), pass.workers, [&](std::int64_t item, int worker) {
        const bool full = item < edge_items;
        const std::int64_t first = full ? item * kQueryRows : n_edge + (item - edge_items) * kQueryRows;
        const std::int64_t count = std::min(kQueryRows, (full ? n_edge : n) - first);
        const std::int32_t* index = pass.order + first;
        const std::int64_t stride = round_to(a, P);
        float* queries = pass.scratch_of(worker);
        float* result = queries + kQueryRows * stride;
        float* rows = result + kQueryRows * stride;
        float* space = rows + 2 * kQueryRows * pass.padded;
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(pass.queries + index[i] * a, a, queries + i * stride);
        if (full) {
            kernels_.attend(keys, queries, stride, count, result, stride, space);
        } else {
            kernels_.bsq(codes, queries, stride, count, result, stride, space);
        }
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(pass.x + index[i] * d, d, rows + i * pass.padded);
        kernels_.linear(block.proj, result, stride, count, Finish::add, rows, pass.padded);
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(rows + i * pass.padded, d, pass.x + index[i] * d);
        kernels_.norm(rows, pass.padded, count, d, block.norm2_weight, block.norm2_bias);
        for (std::int64_t i = 0; i < count; ++i) std::copy_n(rows + i * pass.padded, d, pass.normed + index[i] * d);
    });
}

TokenBox Decoder::locate(const EncodedImage& image, const std::uint8_t* state, std::ptrdiff_t row_stride,
                         const Box& box, float* low, float* tokens) const {
    const std::int64_t height = image.rows * kToken;
    const std::int64_t width = image.columns * kToken;
    const std::int64_t P = kernels_.panel;
    Pass pass{};
    pass.image = &image;
    pass.workers = threads();
    pass.n = image.rows * image.columns;
    pass.d = sizes_.width;
    pass.a = sizes_.attention;
    pass.padded = round_to(pass.d, P);
    pass.x = tokens;
    std::uint8_t* edge = nullptr;
    for (const bool counting : {true, false}) {
        Pieces pieces(counting ? nullptr : pass_arena.get(0));
        edge = pieces.take<std::uint8_t>(pass.n);
        pass.lay_out(pieces, *this);
        if (counting) pass_arena.get(pieces.used());
    }
    pass.edge = edge;
    const std::int64_t key_words = words_of(pass.a, kernels_.pairs);
    std::fill_n(pass.keys + pass.n / P * P * key_words, (round_to(pass.n, P) - pass.n / P * P) * key_words, 0.0F);
    if (kernels_.pairs) std::fill_n(pass.paired_values, round_to(pass.a, P) * words_of(pass.n, true), 0.0F);

    edge_tokens(kernels_, state, row_stride, height, width, box, sizes_.constant_is_edge, kToken, edge);
    prompt_.add(state, row_stride, height, width, box, image.tokens, pass.x);
    std::int64_t place = 0;
    for (const bool wanted : {true, false}) {
        for (std::int64_t t = 0; t < pass.n; ++t) {
            if ((edge[t] != 0) == wanted) pass.order[place++] = static_cast<std::int32_t>(t);
        }
    }
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
        attention(blocks_[i], pass);
        experts_[i].forward(pass.normed, pass.d, edge, pass.n, pass.added, pass.d);
        pass.pending = true;
    }

    for_items(blocks_of(pass.n, kMaxRows), pass.workers, [&](std::int64_t item, int worker) {
        const std::int64_t first = item * kMaxRows;
        const std::int64_t count = std::min(kMaxRows, pass.n - first);
        pass.settle(first, count);
        const float* from = pass.x + first * pass.d;
        std::int64_t stride = pass.d;
        float* to = pass.scratch_of(worker);
        for (int j = 0; j < 4; ++j) {
            const std::int64_t out_stride = j < 3 ? round_to(low_[j].outputs, P) : 1;
            float* out = j < 3 ? to : low + first;
            kernels_.linear(low_[j], from, stride, count, j < 3 ? Finish::silu : Finish::plain, out, out_stride);
            from = to;
            stride = out_stride;
            to += kMaxRows * out_stride;
        }
    });
    TokenBox found{image.columns, image.rows, 0, 0};
    for (std::int64_t t = 0; t < pass.n; ++t) {
        if (!(low[t] > sizes_.low_threshold)) continue;
        const std::int64_t row = t / image.columns;
        const std::int64_t column = t % image.columns;
        found = {std::min(found.left, column), std::min(found.top, row), std::max(found.right, column + 1),
                 std::max(found.bottom, row + 1)};
    }
    return found.right > 0 ? found : TokenBox{0, 0, image.columns, image.rows};
}

}  // namespace i2f
