// Runs an ExecuTorch program of a decoder that keeps its own key-value cache: greedy generation, or the logits of a whole
// text. The command line, the events and the program's methods are the contract in docs/contracts.md.
//
// Weights stay pages of the mapped file until a kernel or a delegate reads them. The cache is memory that the system
// gives only as it is written.

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include "arguments.h"
#include "events.h"
#include "llama_kernels.h"
#include "run.h"
#include "runtime_log.h"
#include "threadpool_abi.h"

namespace {

using boa::Arguments;
using boa::check;
using boa::Event;
using boa::now_ns;
using boa::take;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::MallocMemoryAllocator;
using executorch::extension::MmapDataLoader;
using executorch::runtime::EValue;
using executorch::runtime::EventTracer;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::MethodMeta;
using executorch::runtime::Program;
using executorch::runtime::Span;
using executorch::runtime::Tag;
using executorch::runtime::TensorInfo;

constexpr const char* kForward = "forward";

// Zeroed memory that costs nothing before it is written.
class Pages {
  public:
    explicit Pages(std::size_t size) : size_(std::max<std::size_t>(size, 1)) {
        void* data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (data == MAP_FAILED) throw std::runtime_error("no memory for " + std::to_string(size_) + " bytes");
        data_ = static_cast<std::uint8_t*>(data);
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    Pages(Pages&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
    ~Pages() {
        if (data_ != nullptr) munmap(data_, size_);
    }

    Span<std::uint8_t> span() const { return {data_, size_}; }

  private:
    std::uint8_t* data_ = nullptr;
    std::size_t size_;
};

// A method and the memory it works in.
class LoadedMethod {
  public:
    LoadedMethod(const Program& program, const char* name, EventTracer* tracer) {
        const MethodMeta meta = take(program.method_meta(name), std::string("method ") + name);
        for (std::size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
            pages_.emplace_back(static_cast<std::size_t>(take(meta.memory_planned_buffer_size(i), "planned memory")));
            spans_.push_back(pages_.back().span());
        }
        planned_ = std::make_unique<HierarchicalAllocator>(Span<Span<std::uint8_t>>(spans_.data(), spans_.size()));
        manager_ = std::make_unique<MemoryManager>(&allocator_, planned_.get(), &temporary_);
        auto loaded = program.load_method(name, manager_.get(), tracer);
        check(loaded.error(), std::string("loading method ") + name);
        method_ = std::make_unique<Method>(std::move(loaded.get()));
    }

    Method& operator*() const { return *method_; }
    Method* operator->() const { return method_.get(); }

  private:
    // Destroyed in reverse order: the method before what it points into.
    std::vector<Pages> pages_;
    std::vector<Span<std::uint8_t>> spans_;
    MallocMemoryAllocator allocator_, temporary_;
    std::unique_ptr<HierarchicalAllocator> planned_;
    std::unique_ptr<MemoryManager> manager_;
    std::unique_ptr<Method> method_;
};

// What a method without inputs answers.
std::int64_t constant(const Program& program, const char* name) {
    const LoadedMethod method(program, name, nullptr);
    if (method->inputs_size() != 0 || method->outputs_size() != 1) {
        throw std::runtime_error(std::string("method ") + name + " must have no input and one output");
    }
    check(method->execute(), std::string("method ") + name);
    const EValue& answer = method->get_output(0);
    if (!answer.isInt()) throw std::runtime_error(std::string("method ") + name + " does not answer with a whole number");
    return answer.toInt();
}

std::string text(const Span<const std::int32_t>& sizes) {
    std::string out = "[";
    for (std::size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
    return out + "]";
}

void expect(const TensorInfo& info, const std::string& what, ScalarType type, const std::string& wanted, bool right) {
    if (info.scalar_type() == type && right) return;
    throw std::runtime_error(what + " of method forward has element type " +
                             std::to_string(static_cast<int>(info.scalar_type())) + " and shape " + text(info.sizes()) +
                             ", expected element type " + std::to_string(static_cast<int>(type)) + " and " + wanted);
}

// A program, its cache and where the text stands.
class Decoder {
  public:
    Decoder(const Arguments& arguments, EventTracer* tracer)
        : loader_(take(MmapDataLoader::from(arguments.model.c_str(), MmapDataLoader::MlockConfig::NoMlock),
                       arguments.model)),
          program_(take(Program::load(&loader_, Program::Verification::InternalConsistency), arguments.model)) {
        describe(arguments.prefill);
        method_ = std::make_unique<LoadedMethod>(program_, kForward, tracer);
        if (!output_planned_) {
            logits_.resize(static_cast<std::size_t>(vocabulary_));
            check((*method_)->set_output_data_ptr(logits_.data(), logits_.size() * sizeof(float), 0), "output");
        }
    }

    std::int64_t vocabulary() const { return vocabulary_; }
    std::int64_t context() const { return context_; }
    std::int64_t prefill() const { return prefill_; }

    // What stands in the cache from the position on is not read.
    void reset() { position_ = 0; }

    // In pieces of at most prefill() tokens; the logits are valid until the next call.
    const float* step(const std::int64_t* tokens, std::size_t count) {
        const float* logits = nullptr;
        while (count > 0) {
            const std::size_t piece = std::min(count, static_cast<std::size_t>(prefill_));
            logits = run(tokens, piece);
            tokens += piece;
            count -= piece;
        }
        return logits;
    }

    // Token by token: the program gives the last position's logits only.
    template <typename Sink>
    void score(const std::vector<std::int64_t>& tokens, const Sink& sink) {
        reset();
        for (const std::int64_t token : tokens) sink(run(&token, 1), 1);
    }

  private:
    const float* run(const std::int64_t* tokens, std::size_t count) {
        TensorImpl::SizesType token_sizes[] = {1, static_cast<TensorImpl::SizesType>(count)};
        TensorImpl::SizesType position_sizes[] = {1};
        TensorImpl::DimOrderType order[] = {0, 1};
        TensorImpl::StridesType token_strides[] = {token_sizes[1], 1};
        TensorImpl::StridesType position_strides[] = {1};
        tokens_.assign(tokens, tokens + count);  // the method may keep a pointer to its inputs
        written_ = position_;
        TensorImpl token_impl(ScalarType::Long, 2, token_sizes, tokens_.data(), order, token_strides);
        TensorImpl position_impl(ScalarType::Long, 1, position_sizes, &written_, order, position_strides);
        Method& method = **method_;
        check(method.set_input(EValue(Tensor(&token_impl)), 0), "tokens");
        check(method.set_input(EValue(Tensor(&position_impl)), 1), "position");
        check(method.execute(), "running method forward");
        position_ += static_cast<std::int64_t>(count);
        const EValue& output = method.get_output(0);
        if (!output.isTensor() || output.toTensor().numel() != vocabulary_) {
            throw std::runtime_error("method forward did not give one row of " + std::to_string(vocabulary_) + " logits");
        }
        return output.toTensor().const_data_ptr<float>();
    }

    void describe(int wanted_prefill) {
        const MethodMeta meta = take(program_.method_meta(kForward), "method forward");
        if (meta.num_inputs() != 2 || meta.num_outputs() != 1 || take(meta.input_tag(0), "input") != Tag::Tensor ||
            take(meta.input_tag(1), "input") != Tag::Tensor || take(meta.output_tag(0), "output") != Tag::Tensor) {
            throw std::runtime_error("method forward must take the tensors tokens and input_pos and give the tensor logits");
        }
        const TensorInfo tokens = take(meta.input_tensor_meta(0), "input");
        const TensorInfo position = take(meta.input_tensor_meta(1), "input");
        const TensorInfo logits = take(meta.output_tensor_meta(0), "output");
        const auto sizes = tokens.sizes();
        expect(tokens, "input tokens", ScalarType::Long, "[1, prefill]", sizes.size() == 2 && sizes[0] == 1 && sizes[1] > 0);
        expect(position, "input input_pos", ScalarType::Long, "[1]",
               position.sizes().size() == 1 && position.sizes()[0] == 1);
        const auto row = logits.sizes();
        expect(logits, "output logits", ScalarType::Float, "[1, vocabulary]",
               row.size() == 2 && row[0] == 1 && row[1] > 0);
        vocabulary_ = row[1];
        output_planned_ = logits.is_memory_planned();
        const std::int64_t named = constant(program_, "get_vocab_size");
        if (named != vocabulary_) {
            throw std::runtime_error("get_vocab_size says " + std::to_string(named) + ", the logits have " +
                                     std::to_string(vocabulary_) + " entries");
        }
        context_ = constant(program_, "get_max_context_len");
        prefill_ = constant(program_, "get_max_seq_len");
        if (prefill_ < 1 || prefill_ > sizes[1] || prefill_ > context_) {
            throw std::runtime_error("get_max_seq_len says " + std::to_string(prefill_) + ", but tokens holds " +
                                     std::to_string(sizes[1]) + " and the context " + std::to_string(context_));
        }
        if (wanted_prefill > prefill_) {
            throw std::runtime_error("--prefill is " + std::to_string(wanted_prefill) + "; the program takes at most " +
                                     std::to_string(prefill_) + " tokens at once");
        }
        if (wanted_prefill > 0) prefill_ = wanted_prefill;
    }

    // Destroyed in reverse order: the method before the program, the program before its file.
    MmapDataLoader loader_;
    Program program_;
    std::unique_ptr<LoadedMethod> method_;
    std::vector<float> logits_;
    std::vector<std::int64_t> tokens_;
    std::int64_t written_ = 0;
    std::int64_t vocabulary_ = 0, context_ = 0, prefill_ = 0, position_ = 0;
    bool output_planned_ = false;
};

void set_threads(int threads) {
    auto* pool = executorch::extension::threadpool::get_threadpool();
    const auto wanted = static_cast<std::uint32_t>(threads);
    if (pool == nullptr || !pool->_unsafe_reset_threadpool(wanted) || pool->get_thread_count() != wanted) {
        throw std::runtime_error("the runtime's thread pool cannot be set to " + std::to_string(threads) + " threads");
    }
}

void write_profile(executorch::etdump::ETDumpGen& tracer, const std::string& path) {
    const executorch::etdump::ETDumpResult dump = tracer.get_etdump_data();
    const std::unique_ptr<void, void (*)(void*)> owner(dump.buf, std::free);
    if (dump.buf == nullptr || dump.size == 0) throw std::runtime_error("the runtime recorded no profile");
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (file == nullptr) throw std::runtime_error(path + ": the profile cannot be created");
    const bool written = std::fwrite(dump.buf, 1, dump.size, file) == dump.size;
    const bool closed = std::fclose(file) == 0;
    if (!written || !closed) throw std::runtime_error(path + ": the profile cannot be written (disk full?)");
}

void run(int argc, char** argv) {
    const Arguments arguments = boa::parse_arguments(argc, argv, {"llm"}, {"--prefill", "--profile"});
    if (!arguments.config.empty()) throw std::invalid_argument("--config: this runtime has no settings");
    boa::stay_on(arguments.cores);
    const std::vector<std::int64_t> tokens = boa::read_tokens(arguments.tokens);
    boa::catch_messages();
    executorch::runtime::runtime_init();
    const char* attention = boa::attention_kernel();
    if (attention == nullptr) throw std::runtime_error("the attention kernels could not be registered: " + boa::said());
    set_threads(arguments.threads);
    boa::start_event("executorch", BOA_EDGE_RUNTIME_VERSION, arguments, tokens.size())
        .add("attention", std::string("boa-edge ") + attention)
        .send();

    std::unique_ptr<executorch::etdump::ETDumpGen> tracer;
    if (!arguments.profile.empty()) tracer = std::make_unique<executorch::etdump::ETDumpGen>();
    const std::int64_t start = now_ns();
    Decoder decoder(arguments, tracer.get());
    Event("load").add("ns", now_ns() - start).send();
    const auto positions = static_cast<std::int64_t>(tokens.size()) + std::max(arguments.new_tokens, 1) - 1;
    if (positions > decoder.context()) {
        throw std::runtime_error(std::to_string(positions) + " positions are asked for; the program's cache has " +
                                 std::to_string(decoder.context()));
    }
    boa::work(decoder, arguments, tokens);
    if (tracer != nullptr) write_profile(*tracer, arguments.profile);
    boa::send_memory();
}

}  // namespace

int main(int argc, char** argv) {
    return boa::report("boa-edge-runner-executorch", [&] { run(argc, argv); });
}
