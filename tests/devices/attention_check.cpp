// Every version of the attention kernel that this CPU runs against a plain one in double precision.
// Prints: version, case number, largest error over the largest value that could come out.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "attention.h"

namespace {

struct Case {
    int queries, keys, heads, kv_heads, head_size;
    bool causal, masked;
    float scale;
};

// Groups from 1 to 9; head sizes below, at and between vector lengths; one query and many; lone keys and several tiles.
const Case cases[] = {
    {1, 1, 1, 1, 1, true, false, 1},        {1, 7, 4, 4, 3, true, false, 1},        {1, 200, 9, 3, 64, true, false, 0.1f},
    {1, 130, 8, 2, 100, true, false, 0.1f}, {1, 300, 9, 1, 256, true, false, 0.1f}, {5, 64, 2, 1, 20, true, false, 0.3f},
    {40, 40, 6, 2, 64, true, false, 0.2f},  {128, 190, 9, 3, 64, true, false, 0.1f}, {33, 97, 7, 1, 12, false, true, 0.5f},
    {3, 70, 4, 2, 32, false, true, 0.5f},   {20, 65, 2, 2, 128, false, false, 0.1f}, {16, 80, 4, 2, 16, true, false, 60},
    {1, 700, 9, 3, 64, true, false, 0.1f},  {2, 1025, 3, 1, 40, true, false, 0.1f}, {2, 600, 5, 1, 24, false, true, 0.5f},
};

std::uint32_t state = 1;

float uniform() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

std::vector<float> random(std::size_t count) {
    std::vector<float> out(count);
    for (float& value : out) value = uniform();
    return out;
}

std::vector<double> plain(const boa::Attention& a) {
    std::vector<double> out(static_cast<std::size_t>(a.queries * a.heads * a.head_size), 0.0);
    for (std::int64_t q = 0; q < a.queries; ++q) {
        for (std::int64_t h = 0; h < a.heads; ++h) {
            const std::int64_t kv = h / (a.heads / a.kv_heads);
            std::vector<double> scores(static_cast<std::size_t>(a.keys));
            double largest = -INFINITY;
            for (std::int64_t j = 0; j < a.keys; ++j) {
                double score = 0;
                for (std::int64_t d = 0; d < a.head_size; ++d) {
                    score += static_cast<double>(a.query[(q * a.heads + h) * a.head_size + d]) *
                             a.key[(j * a.kv_heads + kv) * a.head_size + d];
                }
                score *= a.scale;
                if (a.mask != nullptr) score += a.mask[q * a.keys + j];
                if (a.causal && j > a.start + q) score = -INFINITY;
                scores[static_cast<std::size_t>(j)] = score;
                largest = std::max(largest, score);
            }
            if (largest == -INFINITY) continue;  // nothing to attend to gives zeros
            double total = 0;
            for (double& score : scores) total += score = std::exp(score - largest);
            for (std::int64_t j = 0; j < a.keys; ++j) {
                for (std::int64_t d = 0; d < a.head_size; ++d) {
                    out[static_cast<std::size_t>((q * a.heads + h) * a.head_size + d)] +=
                        scores[static_cast<std::size_t>(j)] / total * a.value[(j * a.kv_heads + kv) * a.head_size + d];
                }
            }
        }
    }
    return out;
}

}  // namespace

int main() {
    std::vector<boa::AttentionKernel> kernels = {{"baseline", boa::baseline::attend}};
    const boa::AttentionKernel chosen = boa::choose_attention();
    if (chosen.attend != kernels[0].attend) kernels.push_back(chosen);
    int number = 0;
    for (const Case& c : cases) {
        const auto count = [](int a, int b, int d) { return static_cast<std::size_t>(a) * b * d; };
        const std::vector<float> query = random(count(c.queries, c.heads, c.head_size));
        const std::vector<float> key = random(count(c.keys, c.kv_heads, c.head_size));
        const std::vector<float> value = random(count(c.keys, c.kv_heads, c.head_size));
        std::vector<float> mask = random(count(c.queries, c.keys, 1));
        for (int j = 0; j < c.keys; ++j) mask[static_cast<std::size_t>(j)] = -INFINITY;  // the first query sees nothing
        for (int q = 1; q < c.queries; ++q) {  // the others do not see the first tile, and of many keys the first part
            for (int j = 0; j < (c.keys > 512 ? 256 : 64) && j + 1 < c.keys; ++j) mask[static_cast<std::size_t>(q * c.keys + j)] = -INFINITY;
        }
        boa::Attention a;
        std::vector<float> out(query.size());
        a.query = query.data();
        a.key = key.data();
        a.value = value.data();
        a.mask = c.masked ? mask.data() : nullptr;
        a.out = out.data();
        a.queries = c.queries;
        a.keys = c.keys;
        a.heads = c.heads;
        a.kv_heads = c.kv_heads;
        a.head_size = c.head_size;
        a.start = c.keys - c.queries;
        a.causal = c.causal;
        a.scale = c.scale;
        const std::vector<double> wanted = plain(a);
        for (const boa::AttentionKernel& kernel : kernels) {
            std::fill(out.begin(), out.end(), NAN);
            boa::Plan plan(a);
            boa::Scratch scratch;
            for (std::int64_t task = plan.tasks(); task-- > 0;) plan.run(kernel.attend, task, scratch);
            plan.finish();
            double error = 0;
            for (std::size_t i = 0; i < out.size(); ++i) {
                const double difference = std::fabs(out[i] - wanted[i]);
                error = difference <= error ? error : difference;  // NaN wins
            }
            std::printf("%s %d %.3g\n", kernel.name, number, error);
        }
        ++number;
    }
}
