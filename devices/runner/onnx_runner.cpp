// Runs an ONNX decoder with KV-cache inputs and outputs: greedy generation, or the logits of a whole sequence.
// The command line, the events and the graph's inputs are the contract in docs/contracts.md.
//
// The library is opened at run time from beside this program, so building needs neither its header nor its binary.

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "events.h"
#include "ort_abi.h"
#include "run.h"

namespace {

using boa::Arguments;
using boa::Event;
using boa::now_ns;

const ort::Api* api = nullptr;

// Turn a failed call into an exception that carries the library's own words.
void check(ort::Status* status, const std::string& what) {
    if (status == nullptr) return;
    const std::string message = api->error_message(status);
    api->release_status(status);
    throw std::runtime_error(what + ": " + message);
}

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

using Shape = std::vector<std::int64_t>;

std::string text(const Shape& shape) {
    std::string out = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
}

struct Port {
    std::string name;
    int type = 0;
    Shape shape;  // -1 where symbolic
};

Shape shape_of(const ort::TensorInfo* info) {
    std::size_t rank = 0;
    check(api->rank(info, &rank), "rank");
    Shape shape(rank);
    check(api->dimensions(info, shape.data(), rank), "shape");
    return shape;
}

std::vector<Port> ports(const ort::Session* session, ort::Allocator* allocator, bool inputs) {
    std::size_t count = 0;
    check((inputs ? api->input_count : api->output_count)(session, &count), "count of graph ports");
    std::vector<Port> out(count);
    for (std::size_t i = 0; i < count; ++i) {
        char* name = nullptr;
        check((inputs ? api->input_name : api->output_name)(session, i, allocator, &name), "name of a graph port");
        out[i].name = name;
        check(api->allocator_free(allocator, name), "free");
        ort::TypeInfo* raw = nullptr;
        check((inputs ? api->input_type : api->output_type)(session, i, &raw), "type of " + out[i].name);
        const Owned<ort::TypeInfo> type(raw, api->release_type_info);
        const ort::TensorInfo* info = nullptr;
        check(api->as_tensor_info(type.get(), &info), "type of " + out[i].name);
        if (info == nullptr) throw std::runtime_error("graph port '" + out[i].name + "' is not a tensor");
        check(api->element_type(info, &out[i].type), "type of " + out[i].name);
        out[i].shape = shape_of(info);
    }
    return out;
}

void expect(const Port& port, int type, std::size_t rank) {
    if (port.type != type || port.shape.size() != rank) {
        throw std::runtime_error("graph port '" + port.name + "' has element type " + std::to_string(port.type) +
                                 " and shape " + text(port.shape) + ", expected element type " + std::to_string(type) +
                                 " and " + std::to_string(rank) + " dimensions");
    }
}

// A decoder session and its KV cache.
//
// The forms of a graph differ in where they keep the cache and in which logits they give. `qdq` takes the past and
// returns it with the new tokens behind, and always gives all logits. `fused` writes into buffers of the caller's, which
// are given as past and as present, and gives the last position's logits and, on request, those from a position on.
class Decoder {
  public:
    // `capacity`: the most tokens that a sequence will have.
    Decoder(const Arguments& arguments, std::int64_t capacity)
        : fused_(arguments.form != "qdq"), capacity_(capacity) {
        ort::Env* env = nullptr;
        check(api->create_env(ort::kLogWarning, "boa-edge", &env), "environment");
        env_.reset(env);
        check(api->disable_telemetry(env), "telemetry");
        ort::SessionOptions* options = nullptr;
        check(api->create_session_options(&options), "session options");
        const Owned<ort::SessionOptions> owned_options(options, api->release_session_options);
        check(api->set_optimization_level(options, ort::kOptimizeAll), "optimization level");
        check(api->set_intra_op_threads(options, arguments.threads), "threads");
        check(api->set_inter_op_threads(options, 1), "threads");
        for (const auto& [key, value] : arguments.config) {
            check(api->add_session_config(options, key.c_str(), value.c_str()), "--config " + key);
        }
        if (!arguments.profile.empty()) check(api->enable_profiling(options, arguments.profile.c_str()), "--profile");
        ort::Session* session = nullptr;
        check(api->create_session(env, arguments.model.c_str(), options, &session), arguments.model);
        session_.reset(session);
        check(api->default_allocator(&allocator_), "allocator");
        ort::MemoryInfo* memory = nullptr;
        check(api->create_cpu_memory_info(ort::kDeviceAllocator, ort::kDefaultMemory, &memory), "memory");
        memory_.reset(memory);
        describe();
    }

    // Size of the vocabulary as the graph states it; 0 where it is symbolic.
    std::int64_t vocabulary() const { return vocabulary_; }

    // Ends the recording and leaves it at `path`; the library adds the date to the name that it was given.
    void write_profile(const std::string& path) {
        char* name = nullptr;
        check(api->end_profiling(session_.get(), allocator_, &name), "--profile");
        const std::string written = name;
        check(api->allocator_free(allocator_, name), "free");
        if (std::rename(written.c_str(), path.c_str()) != 0) {
            throw std::runtime_error(path + ": the profile cannot be written (disk full?)");
        }
    }

    // Forget the sequence.
    void reset() {
        past_length_ = 0;
        if (fused_ && !past_.empty()) return;  // what stands in the buffers beyond the length is not read
        past_.clear();
        for (const Port& port : past_ports_) {
            const Shape shape = {1, port.shape[1], fused_ ? capacity_ : 0, port.shape[3]};
            ort::Value* value = nullptr;
            check(api->create_tensor(allocator_, shape.data(), shape.size(), port.type, &value), port.name);
            past_.emplace_back(value, api->release_value);
        }
    }

    // Run `tokens` after what is in the cache; gives the last one's logits [vocabulary], valid until the next call.
    const float* step(const std::int64_t* tokens, std::size_t count) {
        const float* logits = run(tokens, count, false);
        return fused_ ? logits : logits + (static_cast<std::int64_t>(count) - 1) * vocabulary_;
    }

    // Run `tokens` as a sequence of their own, in one call.
    template <typename Sink>
    void score(const std::vector<std::int64_t>& tokens, const Sink& sink) {
        reset();
        sink(run(tokens.data(), tokens.size(), true), tokens.size());
    }

  private:
    const float* run(const std::int64_t* tokens, std::size_t count, bool all) {
        const std::int64_t total = past_length_ + static_cast<std::int64_t>(count);
        ids_.assign(tokens, tokens + count);
        mask_.assign(static_cast<std::size_t>(total), 1);
        positions_.resize(count);
        for (std::size_t i = 0; i < count; ++i) positions_[i] = past_length_ + static_cast<std::int64_t>(i);
        start_.assign(1, 0);

        std::vector<const char*> names = input_names_;
        std::vector<Owned<ort::Value>> owned;
        owned.push_back(wrap(ids_, {1, static_cast<std::int64_t>(count)}));
        owned.push_back(wrap(mask_, {1, total}));
        if (!fused_) owned.push_back(wrap(positions_, {1, static_cast<std::int64_t>(count)}));
        std::vector<const ort::Value*> inputs;
        for (const auto& value : owned) inputs.push_back(value.get());
        for (const auto& value : past_) inputs.push_back(value.get());
        if (fused_ && all) {
            owned.push_back(wrap(start_, {1}));
            inputs.push_back(owned.back().get());
            names.push_back(kLogitsStart);
        }
        std::vector<const char*> wanted = output_names_;
        if (fused_ && all) wanted[0] = kAllLogits;
        if (!fused_ && all) wanted.resize(1);  // no further step will want the cache
        std::vector<ort::Value*> outputs(wanted.size(), nullptr);
        if (fused_) {
            for (std::size_t i = 0; i < past_.size(); ++i) outputs[i + 1] = past_[i].get();  // written in place
        }
        check(api->run(session_.get(), nullptr, names.data(), inputs.data(), inputs.size(), wanted.data(),
                       outputs.size(), outputs.data()),
              "inference");
        logits_.reset(outputs[0]);
        if (!fused_ && !all) {
            past_.clear();
            for (std::size_t i = 1; i < outputs.size(); ++i) past_.emplace_back(outputs[i], api->release_value);
        }
        past_length_ = total;

        const std::int64_t rows = fused_ && !all ? 1 : static_cast<std::int64_t>(count);
        ort::TensorInfo* raw = nullptr;
        check(api->value_info(logits_.get(), &raw), "logits");
        const Owned<ort::TensorInfo> info(raw, api->release_tensor_info);
        const Shape shape = shape_of(info.get());
        const bool right = shape.size() == 3 && shape[0] == 1 && shape[1] == rows && shape[2] > 0 && (vocabulary_ == 0 || shape[2] == vocabulary_);
        if (!right) {
            throw std::runtime_error("logits have shape " + text(shape) + " for " + std::to_string(count) + " tokens");
        }
        vocabulary_ = shape[2];
        void* data = nullptr;
        check(api->tensor_data(logits_.get(), &data), "logits");
        return static_cast<const float*>(data);
    }

    void describe() {
        const std::vector<Port> inputs = ports(session_.get(), allocator_, true);
        const std::vector<Port> outputs = ports(session_.get(), allocator_, false);
        names_ = {"input_ids", "attention_mask"};
        if (!fused_) names_.push_back("position_ids");
        const std::size_t wanted = names_.size();
        std::size_t plain = 0;
        for (const Port& port : inputs) {
            if (std::find(names_.begin(), names_.begin() + wanted, port.name) != names_.begin() + wanted) {
                expect(port, ort::kElementInt64, 2);
                ++plain;
            } else if (port.name.rfind(kPast, 0) == 0) {
                expect(port, port.type == ort::kElementInt8 ? ort::kElementInt8 : ort::kElementFloat, 4);
                if (port.shape[1] <= 0 || port.shape[3] <= 0) {
                    throw std::runtime_error("graph input '" + port.name + "' has shape " + text(port.shape) +
                                             "; heads and head size must be fixed numbers");
                }
                past_ports_.push_back(port);
            } else {
                throw std::runtime_error("graph input '" + port.name + "' is not one that this runner knows");
            }
        }
        if (plain != wanted) {
            throw std::runtime_error(std::string("the graph must have the inputs input_ids") +
                                     (fused_ ? " and attention_mask" : ", attention_mask and position_ids"));
        }
        const auto output = [&](const std::string& name) -> const Port& {
            for (const Port& port : outputs) {
                if (port.name == name) return port;
            }
            throw std::runtime_error("the graph has no output '" + name + "'");
        };
        const Port& logits = output("logits");
        expect(logits, ort::kElementFloat, 3);
        if (fused_) expect(output(kAllLogits), ort::kElementFloat, 3);
        vocabulary_ = logits.shape[2] > 0 ? logits.shape[2] : 0;
        present_names_ = {"logits"};
        for (const Port& port : past_ports_) {
            names_.push_back(port.name);
            present_names_.push_back(kPresent + port.name.substr(std::string(kPast).size()));
            expect(output(present_names_.back()), port.type, 4);
        }
        for (const std::string& name : names_) input_names_.push_back(name.c_str());
        for (const std::string& name : present_names_) output_names_.push_back(name.c_str());
    }

    Owned<ort::Value> wrap(std::vector<std::int64_t>& data, const Shape& shape) {
        ort::Value* value = nullptr;
        check(api->wrap_tensor(memory_.get(), data.data(), data.size() * sizeof(std::int64_t), shape.data(), shape.size(),
                               ort::kElementInt64, &value),
              "input tensor");
        return Owned<ort::Value>(value, api->release_value);
    }

    static constexpr const char* kPast = "past_key_values.";
    static constexpr const char* kPresent = "present.";
    static constexpr const char* kLogitsStart = "logits_start";
    static constexpr const char* kAllLogits = "all_logits";

    const bool fused_;
    const std::int64_t capacity_;

    // Destroyed in reverse order: values before the session, the session before the environment.
    Owned<ort::Env> env_{nullptr, api->release_env};
    Owned<ort::Session> session_{nullptr, api->release_session};
    Owned<ort::MemoryInfo> memory_{nullptr, api->release_memory_info};
    ort::Allocator* allocator_ = nullptr;  // the library's own; never released
    std::vector<std::string> names_, present_names_;
    std::vector<const char*> input_names_, output_names_;
    std::vector<Port> past_ports_;
    std::vector<Owned<ort::Value>> past_;
    std::vector<std::int64_t> ids_, mask_, positions_, start_;
    Owned<ort::Value> logits_{nullptr, api->release_value};
    std::int64_t vocabulary_ = 0;
    std::int64_t past_length_ = 0;
};

const char* open_library() {
    void* library = dlopen("libonnxruntime.so", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(std::string("ONNX Runtime cannot be loaded: ") + dlerror());
    const auto get_base = reinterpret_cast<ort::GetApiBase>(dlsym(library, "OrtGetApiBase"));
    if (get_base == nullptr) throw std::runtime_error("libonnxruntime.so does not export OrtGetApiBase");
    const ort::ApiBase* base = get_base();
    api = base->get_api(ort::kApiVersion);
    if (api == nullptr) {
        throw std::runtime_error(std::string("ONNX Runtime ") + base->version() + " is too old for this runner");
    }
    return base->version();
}

void run(int argc, char** argv) {
    const Arguments arguments = boa::parse_arguments(argc, argv, {"qdq", "fused", "fused-int8"}, {"--profile"});
    boa::stay_on(arguments.cores);
    const std::vector<std::int64_t> tokens = boa::read_tokens(arguments.tokens);
    const char* version = open_library();
    boa::start_event("onnx", version, arguments, tokens.size()).send();

    const std::int64_t start = now_ns();
    const auto longest = static_cast<std::int64_t>(tokens.size()) + arguments.new_tokens;
    Decoder decoder(arguments, longest);
    Event("load").add("ns", now_ns() - start).send();
    boa::work(decoder, arguments, tokens);
    if (!arguments.profile.empty()) decoder.write_profile(arguments.profile);
    boa::send_memory();
}

}  // namespace

int main(int argc, char** argv) {
    return boa::report("boa-edge-runner-onnx", [&] { run(argc, argv); });
}
