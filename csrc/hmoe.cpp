#include "hmoe.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "packing.h"
#include "thread_pool.h"

namespace i2f {
namespace {

// Hands out 64-byte aligned pieces, zero-filled; without memory it only counts.
class Packer {
public:
    explicit Packer(float* memory) : memory_(memory) {}

    float* take(std::int64_t count) {
        float* piece = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += round_up(static_cast<std::size_t>(count), kAlignment / sizeof(float));
        return piece;
    }
    std::size_t used() const { return used_; }

private:
    float* memory_;
    std::size_t used_ = 0;
};

// Row `from` [terms] of a weight becomes column `column` of panels [words][width].
void pack_column(const float* from, std::int64_t terms, std::int64_t width, std::int64_t column, bool pairs,
                 float* panels) {
    float* to = panels + column / width * width * words_of(terms, pairs) + column % width;
    for (std::int64_t k = 0; k < terms; ++k) put(to, width, k, from[k], pairs);
}

const float* pack_vector(Packer& packer, const float* from, std::int64_t count, std::int64_t step) {
    float* to = packer.take(blocks_of(count, step) * step);
    if (to != nullptr) std::copy(from, from + count, to);
    return to;
}

FfnWeights pack_ffn(Packer& packer, const FfnSource& from, std::int64_t d, std::int64_t hidden, std::int64_t lanes,
                    bool pairs) {
    FfnWeights to{};
    to.width = d;
    to.hidden = hidden;
    to.pairs = pairs;
    float* w12 = packer.take(blocks_of(hidden, lanes) * words_of(d, pairs) * 2 * lanes);
    float* b12 = packer.take(blocks_of(hidden, lanes) * 2 * lanes);
    float* w3 = packer.take(blocks_of(d, 2 * lanes) * words_of(hidden, pairs) * 2 * lanes);
    to.w12 = w12;
    to.b12 = b12;
    to.w3 = w3;
    to.b3 = pack_vector(packer, from.b3, d, 2 * lanes);
    if (w12 == nullptr) return to;
    for (std::int64_t j = 0; j < hidden; ++j) {
        const std::int64_t column = j / lanes * 2 * lanes + j % lanes;  // of w1; w2 stands `lanes` further
        pack_column(from.w1 + j * d, d, 2 * lanes, column, pairs, w12);
        pack_column(from.w2 + j * d, d, 2 * lanes, column + lanes, pairs, w12);
        b12[column] = from.b1[j];
        b12[column + lanes] = from.b2[j];
    }
    for (std::int64_t j = 0; j < d; ++j) pack_column(from.w3 + j * hidden, hidden, 2 * lanes, j, pairs, w3);
    return to;
}

// Below this many multiply-adds a call is over before a second thread has woken up.
constexpr std::int64_t kWorthAThread = 1 << 20;

thread_local Arena arena;

}  // namespace

Hmoe::Hmoe(const HmoeSource& source, const Kernels& kernels)
    : kernels_(kernels), width_(source.width), hidden_(source.hidden), routed_(static_cast<std::size_t>(source.experts)) {
    const std::int64_t d = width_;
    const std::int64_t hidden = hidden_;
    const std::int64_t experts = source.experts;
    const std::int64_t lanes = kernels.lanes;
    for (const bool counting : {true, false}) {
        Packer packer(counting ? nullptr : memory_.get());
        const float* shared_norm_weight = pack_vector(packer, source.shared_norm_weight, hidden, lanes);
        const float* shared_norm_bias = pack_vector(packer, source.shared_norm_bias, hidden, lanes);
        const float* norm_weight = pack_vector(packer, source.norm_weight, hidden, lanes);
        const float* norm_bias = pack_vector(packer, source.norm_bias, hidden, lanes);
        shared_ = pack_ffn(packer, source.shared, d, hidden, lanes, kernels.pairs);
        shared_.norm_weight = shared_norm_weight;
        shared_.norm_bias = shared_norm_bias;
        for (std::int64_t e = 0; e < experts; ++e) {
            const FfnSource& all = source.routed;
            const FfnSource one{all.w1 + e * hidden * d, all.b1 + e * hidden,     all.w2 + e * hidden * d,
                                all.b2 + e * hidden,     all.w3 + e * d * hidden, all.b3 + e * d};
            FfnWeights& packed = routed_[static_cast<std::size_t>(e)];
            packed = pack_ffn(packer, one, d, hidden, lanes, kernels.pairs);
            packed.norm_weight = norm_weight;
            packed.norm_bias = norm_bias;
        }
        const std::int64_t columns = round_to(experts, lanes);
        float* gate_w = packer.take(columns * d);
        float* gate_b = packer.take(columns);
        float* bias = packer.take(columns);
        const float* shared_gate = pack_vector(packer, source.shared_gate_weight, d, lanes);
        gates_ = {d, experts, gate_w, gate_b, bias, shared_gate, source.shared_gate_bias[0]};
        if (counting) {
            size_ = packer.used();
            memory_ = allocate<float>(size_);
            std::fill_n(memory_.get(), size_, 0.0F);
            continue;
        }
        for (std::int64_t e = 0; e < experts; ++e) {
            const std::int64_t first = e / (2 * lanes) * 2 * lanes;  // of the panel
            pack_column(source.expert_gate_weight + e * d, d, std::min(2 * lanes, columns - first), e - first, false,
                        gate_w + first * d);
            gate_b[e] = source.expert_gate_bias[e];
        }
        std::fill_n(bias, columns, -std::numeric_limits<float>::infinity());
        std::copy_n(source.expert_bias, experts, bias);
    }
}

std::size_t Hmoe::scratch_floats() const {
    const std::int64_t step = 2 * kernels_.lanes;
    const std::int64_t widest = std::max(blocks_of(hidden_, step), blocks_of(gates_.experts, step)) * step;
    return round_up(static_cast<std::size_t>(kMaxRows * (widest + round_to(width_, step))), kAlignment / sizeof(float));
}

namespace {

// What the items of the two parallel regions need. Region 1: gates of edge tokens, then shared network of all
// tokens. Region 2: routed experts, blended into what region 1 wrote.
struct Call {
    const Kernels* kernels;
    const FfnWeights* shared;
    const FfnWeights* routed;
    const GateWeights* gates;
    Rows rows;  // index, first and count are set for each item
    std::int64_t tokens;
    std::int64_t edge_tokens;
    std::int64_t block;         // rows of an item
    std::int64_t gate_items;    // region 1
    const std::int32_t* index;  // [edge tokens] the edge tokens in order
    std::int32_t* chosen;       // [edge tokens]
    float* share;               // [edge tokens]
    const std::int32_t* sorted_index;  // [edge tokens] by expert
    const float* sorted_share;         // [edge tokens]
    std::int64_t starts[kMaxExperts + 1];       // of each expert in sorted_index
    std::int64_t item_starts[kMaxExperts + 1];  // of each expert in the items of region 2
    float* scratch;
    std::size_t scratch_floats;

    float* scratch_of(int worker) const { return scratch + static_cast<std::size_t>(worker) * scratch_floats; }
};

void run_gates(const Call& call, std::int64_t item, float* scratch) {
    const std::int64_t first = item * call.block;
    Rows rows = call.rows;
    rows.index = call.index == nullptr ? nullptr : call.index + first;
    rows.first = first;
    rows.count = std::min(call.block, call.edge_tokens - first);
    call.kernels->gates(*call.gates, rows, call.chosen + first, call.share + first, scratch);
}

void region_1(void* context, std::int64_t item, int worker) {
    const Call& call = *static_cast<const Call*>(context);
    if (item < call.gate_items) return run_gates(call, item, call.scratch_of(worker));
    Rows rows = call.rows;
    rows.index = nullptr;
    rows.first = (item - call.gate_items) * call.block;
    rows.count = std::min(call.block, call.tokens - rows.first);
    call.kernels->ffn(*call.shared, rows, nullptr, call.scratch_of(worker));
}

void region_2(void* context, std::int64_t item, int worker) {
    const Call& call = *static_cast<const Call*>(context);
    const std::int64_t* const end = call.item_starts + call.gates->experts + 1;
    const std::int64_t expert = std::upper_bound(call.item_starts, end, item) - call.item_starts - 1;
    const std::int64_t first = call.starts[expert] + (item - call.item_starts[expert]) * call.block;
    Rows rows = call.rows;
    rows.index = call.sorted_index + first;
    rows.count = std::min(call.block, call.starts[expert + 1] - first);
    call.kernels->ffn(call.routed[expert], rows, call.sorted_share + first, call.scratch_of(worker));
}

// Rows an item: enough items for all threads, whole tiles, at most kMaxRows.
std::int64_t block_rows(std::int64_t tokens, int workers, std::int64_t tile) {
    const std::int64_t even = blocks_of(tokens, 3 * static_cast<std::int64_t>(workers));
    return std::min(blocks_of(std::max(even, tile), tile) * tile, kMaxRows);
}

}  // namespace

void Hmoe::forward(const float* x, std::ptrdiff_t x_stride, const std::uint8_t* edge, std::int64_t tokens, float* out,
                   std::ptrdiff_t out_stride) const {
    std::int64_t n_edge = 0;
    for (std::int64_t i = 0; i < tokens; ++i) n_edge += edge[i] != 0 ? 1 : 0;

    const int workers = 3 * hidden_ * width_ * (tokens + n_edge) < kWorthAThread ? 1 : threads();
    const std::size_t scratch = scratch_floats();
    const std::size_t list = round_up(static_cast<std::size_t>(n_edge), kAlignment / sizeof(float));
    float* memory = reinterpret_cast<float*>(
        arena.get((scratch * static_cast<std::size_t>(workers) + 5 * list) * sizeof(float)));
    float* const share = memory;
    float* const sorted_share = memory + list;
    auto* const index = reinterpret_cast<std::int32_t*>(memory + 2 * list);
    auto* const chosen = reinterpret_cast<std::int32_t*>(memory + 3 * list);
    auto* const sorted_index = reinterpret_cast<std::int32_t*>(memory + 4 * list);

    std::int64_t found = 0;
    for (std::int64_t i = 0; i < tokens && found < n_edge; ++i) {
        if (edge[i] != 0) index[found++] = static_cast<std::int32_t>(i);
    }

    Call call{};
    call.kernels = &kernels_;
    call.shared = &shared_;
    call.routed = routed_.data();
    call.gates = &gates_;
    call.rows = {x, x_stride, out, out_stride, nullptr, 0, 0};
    call.tokens = tokens;
    call.edge_tokens = n_edge;
    call.block = block_rows(tokens, workers, kernels_.tile);
    call.gate_items = blocks_of(n_edge, call.block);
    call.index = index;
    call.chosen = chosen;
    call.share = share;
    call.scratch = memory + 5 * list;
    call.scratch_floats = scratch;
    parallel(call.gate_items + blocks_of(tokens, call.block), workers, region_1, &call);
    if (n_edge == 0) return;

    // Counting sort by expert; stable, so the order is the same whatever the threads did.
    const std::int64_t experts = gates_.experts;
    for (std::int64_t i = 0; i < n_edge; ++i) ++call.starts[chosen[i] + 1];
    for (std::int64_t e = 0; e < experts; ++e) call.starts[e + 1] += call.starts[e];
    std::int64_t next[kMaxExperts];
    std::copy(call.starts, call.starts + experts, next);
    for (std::int64_t i = 0; i < n_edge; ++i) {
        const std::int64_t place = next[chosen[i]]++;
        sorted_index[place] = index[i];
        sorted_share[place] = share[i];
    }
    call.sorted_index = sorted_index;
    call.sorted_share = sorted_share;
    call.block = block_rows(n_edge, workers, kernels_.tile);
    for (std::int64_t e = 0; e < experts; ++e) {
        call.item_starts[e + 1] = call.item_starts[e] + blocks_of(call.starts[e + 1] - call.starts[e], call.block);
    }
    parallel(call.item_starts[experts], workers, region_2, &call);
}

void Hmoe::route(const float* x, std::ptrdiff_t x_stride, std::int64_t tokens, std::int32_t* chosen,
                 float* share) const {
    Call call{};
    call.kernels = &kernels_;
    call.gates = &gates_;
    call.rows.x = x;
    call.rows.x_stride = x_stride;
    call.edge_tokens = tokens;
    call.block = kMaxRows;
    call.chosen = chosen;
    call.share = share;
    float* const scratch = reinterpret_cast<float*>(arena.get(scratch_floats() * sizeof(float)));
    for (std::int64_t item = 0; item < blocks_of(tokens, call.block); ++item) run_gates(call, item, scratch);
}

}  // namespace i2f
