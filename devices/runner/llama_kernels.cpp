// The operators that a language model's program needs and that the runtime's libraries lack, registered with the
// runtime before main() runs:
//   llama::update_cache.out(value, cache, start_pos, *, out)
//   llama::update_cache_with_indices.out(value, cache, start_pos, indices, *, out)
//   llama::custom_sdpa.out(query, key, value, start_pos, attn_mask, dropout_p, is_causal, scale, *, out)
// Shapes: value [1, S, kv_heads, head_size] and cache [1, context, kv_heads, head_size] of one type; indices int64 [1, S],
// the rows of the cache that the rows of value go to, in place of start_pos; query
// [1, S, heads, head_size] float32, key and value the whole caches. A mask is float32 [S, context] and excludes
// is_causal; without one, keys from start_pos + S on are not looked at.

#include "llama_kernels.h"

#include <cinttypes>
#include <cmath>
#include <cstring>
#include <optional>

#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/core/event_tracer_hooks.h>
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include "attention.h"
#include "threadpool_abi.h"

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

using Arguments = Span<EValue*>;

// Below this many multiplications waking another thread costs more than it saves.
constexpr std::int64_t kWorthThreads = 1 << 17;

const boa::AttentionKernel kernel = boa::choose_attention();

bool dense(const Tensor& tensor) {
    std::int64_t expected = 1;
    for (auto i = tensor.dim() - 1; i >= 0; --i) {
        if (tensor.size(i) != 1 && tensor.strides()[i] != expected) return false;
        expected *= tensor.size(i);
    }
    return true;
}

// A dense tensor [1, n, heads, head_size].
bool heads(const Tensor& tensor) { return tensor.dim() == 4 && tensor.size(0) == 1 && dense(tensor); }

// New rows and the cache that they go to: of one type, and alike but for their number.
bool alike(const Tensor& value, const Tensor& cache) {
    return heads(value) && heads(cache) && value.scalar_type() == cache.scalar_type() && value.size(2) == cache.size(2) &&
           value.size(3) == cache.size(3);
}

std::size_t row_bytes(const Tensor& cache) {
    return static_cast<std::size_t>(cache.size(2)) * cache.size(3) * cache.element_size();
}

#define BOA_REQUIRE(condition, ...)              \
    do {                                         \
        if (!(condition)) {                      \
            ET_LOG(Error, __VA_ARGS__);          \
            context.fail(Error::InvalidArgument); \
            return;                              \
        }                                        \
    } while (false)

void update_cache(KernelRuntimeContext& context, Arguments arguments) {
    BOA_REQUIRE(arguments.size() >= 4 && arguments[0]->isTensor() && arguments[1]->isTensor() && arguments[2]->isInt(),
                "llama::update_cache takes value, cache, start_pos and out");
    const executorch::runtime::internal::EventTracerProfileOpScope event(context.internal_event_tracer(),
                                                                        "llama::update_cache");
    const Tensor& value = arguments[0]->toTensor();
    const Tensor& cache = arguments[1]->toTensor();
    const std::int64_t start = arguments[2]->toInt();
    BOA_REQUIRE(alike(value, cache),
                "llama::update_cache: value and cache must be [1, n, heads, head_size], of one type and alike but for n");
    BOA_REQUIRE(start >= 0 && start <= cache.size(1) - value.size(1),
                "llama::update_cache: positions %" PRId64 " to %" PRId64 " are outside a cache of %d", start,
                start + value.size(1), static_cast<int>(cache.size(1)));
    const std::size_t row = row_bytes(cache);
    std::memcpy(static_cast<char*>(cache.mutable_data_ptr()) + start * row, value.const_data_ptr(), value.size(1) * row);
}

void update_cache_with_indices(KernelRuntimeContext& context, Arguments arguments) {
    BOA_REQUIRE(arguments.size() >= 5 && arguments[0]->isTensor() && arguments[1]->isTensor() && arguments[3]->isTensor(),
                "llama::update_cache_with_indices takes value, cache, start_pos, indices and out");
    const executorch::runtime::internal::EventTracerProfileOpScope event(context.internal_event_tracer(),
                                                                        "llama::update_cache_with_indices");
    const Tensor& value = arguments[0]->toTensor();
    const Tensor& cache = arguments[1]->toTensor();
    const Tensor& indices = arguments[3]->toTensor();
    BOA_REQUIRE(alike(value, cache) && indices.scalar_type() == ScalarType::Long && indices.dim() == 2 &&
                    indices.size(0) == 1 && indices.size(1) == value.size(1) && dense(indices),
                "llama::update_cache_with_indices: value and cache must be [1, n, heads, head_size], of one type and alike "
                "but for n, indices int64 [1, n of value]");
    const std::size_t row = row_bytes(cache);
    const std::int64_t* rows = indices.const_data_ptr<std::int64_t>();
    const char* source = static_cast<const char*>(value.const_data_ptr());
    char* target = static_cast<char*>(cache.mutable_data_ptr());
    for (std::int64_t i = 0; i < value.size(1); ++i) {
        BOA_REQUIRE(rows[i] >= 0 && rows[i] < cache.size(1),
                    "llama::update_cache_with_indices: row %" PRId64 " is outside a cache of %d", rows[i],
                    static_cast<int>(cache.size(1)));
        std::memcpy(target + rows[i] * row, source + i * row, row);
    }
}

void attend_all(const boa::Attention& attention) {
    boa::Plan plan(attention);
    const std::int64_t tasks = plan.tasks();
    const auto run = [&](std::size_t task) {
        thread_local boa::Scratch scratch;
        plan.run(kernel.attend, static_cast<std::int64_t>(task), scratch);
    };
    const std::int64_t keys = attention.causal ? attention.start + attention.queries : attention.keys;
    if (tasks > 1 && attention.queries * attention.heads * attention.head_size * keys >= kWorthThreads) {
        executorch::extension::threadpool::get_threadpool()->run(run, static_cast<std::size_t>(tasks));
    } else {
        for (std::int64_t task = 0; task < tasks; ++task) run(static_cast<std::size_t>(task));
    }
    plan.finish();
}

void custom_sdpa(KernelRuntimeContext& context, Arguments arguments) {
    BOA_REQUIRE(arguments.size() >= 9 && arguments[0]->isTensor() && arguments[1]->isTensor() &&
                    arguments[2]->isTensor() && arguments[3]->isInt() && (arguments[4]->isNone() || arguments[4]->isTensor()) &&
                    arguments[5]->isScalar() && arguments[6]->isBool() && (arguments[7]->isNone() || arguments[7]->isDouble()) &&
                    arguments[8]->isTensor(),
                "llama::custom_sdpa takes query, key, value, start_pos, attn_mask, dropout_p, is_causal, scale and out");
    const executorch::runtime::internal::EventTracerProfileOpScope event(context.internal_event_tracer(),
                                                                        "llama::custom_sdpa");
    const Tensor& query = arguments[0]->toTensor();
    const Tensor& key = arguments[1]->toTensor();
    const Tensor& value = arguments[2]->toTensor();
    const std::int64_t start = arguments[3]->toInt();
    const double dropout = arguments[5]->isDouble() ? arguments[5]->toDouble() : static_cast<double>(arguments[5]->toInt());
    const bool causal = arguments[6]->toBool();
    Tensor& out = arguments[8]->toTensor();

    BOA_REQUIRE(heads(query) && heads(key) && heads(value) && query.scalar_type() == ScalarType::Float &&
                    key.scalar_type() == ScalarType::Float && value.scalar_type() == ScalarType::Float,
                "llama::custom_sdpa: query, key and value must be dense float32 [1, n, heads, head_size]");
    BOA_REQUIRE(key.size(1) == value.size(1) && key.size(2) == value.size(2) && key.size(3) == value.size(3) &&
                    query.size(3) == key.size(3) && key.size(2) > 0 && query.size(2) % key.size(2) == 0 && key.size(3) > 0,
                "llama::custom_sdpa: key and value must be alike, with query's head size and a divisor of its heads");
    BOA_REQUIRE(dropout == 0, "llama::custom_sdpa: dropout_p must be 0");
    BOA_REQUIRE(start >= 0 && start <= key.size(1) - query.size(1),
                "llama::custom_sdpa: positions %" PRId64 " to %" PRId64 " are outside a cache of %d", start,
                start + query.size(1), static_cast<int>(key.size(1)));
    boa::Attention attention;
    attention.keys = start + query.size(1);
    if (arguments[4]->isTensor()) {
        const Tensor& mask = arguments[4]->toTensor();
        BOA_REQUIRE(!causal && mask.dim() == 2 && dense(mask) && mask.scalar_type() == ScalarType::Float &&
                        mask.size(0) == query.size(1) && mask.size(1) == key.size(1),
                    "llama::custom_sdpa: a mask must be float32 [queries, context] and excludes is_causal");
        attention.mask = mask.const_data_ptr<float>();
        attention.keys = key.size(1);
    }
    BOA_REQUIRE(executorch::runtime::resize_tensor(out, query.sizes()) == Error::Ok &&
                    out.scalar_type() == ScalarType::Float && heads(out),
                "llama::custom_sdpa: the result must be float32 and as large as query");
    attention.query = query.const_data_ptr<float>();
    attention.key = key.const_data_ptr<float>();
    attention.value = value.const_data_ptr<float>();
    attention.out = out.mutable_data_ptr<float>();
    attention.queries = query.size(1);
    attention.heads = query.size(2);
    attention.kv_heads = key.size(2);
    attention.head_size = query.size(3);
    attention.start = start;
    attention.causal = causal;
    attention.scale = arguments[7]->isDouble() ? static_cast<float>(arguments[7]->toDouble())
                                               : 1.0f / std::sqrt(static_cast<float>(query.size(3)));
    attend_all(attention);
}

const Kernel kernels[] = {
    Kernel("llama::update_cache.out", update_cache),
    Kernel("llama::update_cache_with_indices.out", update_cache_with_indices),
    Kernel("llama::custom_sdpa.out", custom_sdpa),
};
const Error registered = executorch::runtime::register_kernels({kernels, sizeof(kernels) / sizeof(kernels[0])});

}  // namespace

namespace boa {

const char* attention_kernel() { return registered == Error::Ok ? kernel.name : nullptr; }

}  // namespace boa
