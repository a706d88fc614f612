// What every runner does with a decoder: greedy generation or scoring, timed and reported as docs/contracts.md says.
//
// A decoder has: vocabulary(), 0 while unknown; reset(), which forgets the text; step(tokens, count), which reads tokens
// after those before and gives the last one's logits [vocabulary]; score(tokens, sink), which reads a text of its own and
// gives its logits to sink(rows, count) in order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "events.h"

namespace boa {

// The first event of every run; a runner adds what only it has to say, and sends it.
inline Event start_event(const char* runtime, const char* version, const Arguments& arguments, std::size_t tokens) {
    Event event("start");
    event.add("schema", 1)
        .add("runtime", runtime)
        .add("runtime_version", version)
        .add("mode", arguments.mode)
        .add("threads", arguments.threads)
        .add("cores", allowed_cores())
        .add("tokens", static_cast<std::int64_t>(tokens));
    return event;
}

// Index of the largest logit, the lowest one on ties.
inline std::int64_t argmax(const float* logits, std::int64_t count) {
    std::int64_t best = 0;
    bool finite = true;
    for (std::int64_t i = 0; i < count; ++i) {
        finite = finite && std::isfinite(logits[i]);
        if (logits[i] > logits[best]) best = i;
    }
    if (!finite) throw std::runtime_error("the logits hold values that are not finite");
    return best;
}

template <typename Decoder>
void generate(Decoder& decoder, const Arguments& arguments, const std::vector<std::int64_t>& prompt) {
    for (int run = 0; run < arguments.warmup + arguments.repeats; ++run) {
        const bool warmup = run < arguments.warmup;
        const std::int64_t index = run;  // counted runs follow the warm-ups
        const auto send_token = [&](int i, std::int64_t id, std::int64_t ns) {
            Event("token").add("run", index).add("warmup", warmup).add("i", i).add("id", id).add("ns", ns).send();
        };
        decoder.reset();
        std::int64_t start = now_ns();
        const float* logits = decoder.step(prompt.data(), prompt.size());
        std::int64_t id = argmax(logits, decoder.vocabulary());
        std::int64_t ns = now_ns() - start;
        Event("prefill")
            .add("run", index)
            .add("warmup", warmup)
            .add("tokens", static_cast<std::int64_t>(prompt.size()))
            .add("ns", ns)
            .send();
        send_token(0, id, ns);
        for (int i = 1; i < arguments.new_tokens; ++i) {
            start = now_ns();
            logits = decoder.step(&id, 1);
            id = argmax(logits, decoder.vocabulary());
            ns = now_ns() - start;
            send_token(i, id, ns);
        }
    }
}

// The logits' file, rows as they come.
class LogitsFile {
  public:
    explicit LogitsFile(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "wb")) {
        if (file_ == nullptr) throw std::runtime_error(path_ + ": the logits file cannot be created");
    }
    LogitsFile(const LogitsFile&) = delete;
    LogitsFile& operator=(const LogitsFile&) = delete;
    ~LogitsFile() {
        if (file_ != nullptr) std::fclose(file_);
    }

    void write(const float* values, std::size_t count) {
        if (std::fwrite(values, sizeof(float), count, file_) != count) fail();
    }

    void close() {
        const bool closed = std::fclose(file_) == 0;
        file_ = nullptr;
        if (!closed) fail();
    }

  private:
    [[noreturn]] void fail() const {
        throw std::runtime_error(path_ + ": the logits cannot be written (disk full?)");
    }

    std::string path_;
    std::FILE* file_;
};

template <typename Decoder>
void score(Decoder& decoder, const Arguments& arguments, const std::vector<std::int64_t>& tokens) {
    LogitsFile file(arguments.logits);
    std::int64_t writing = 0;  // no part of the model's time
    const auto sink = [&](const float* rows, std::size_t count) {
        const std::int64_t start = now_ns();
        file.write(rows, count * static_cast<std::size_t>(decoder.vocabulary()));
        writing += now_ns() - start;
    };
    const std::int64_t start = now_ns();
    decoder.score(tokens, sink);
    const std::int64_t ns = now_ns() - start - writing;
    file.close();
    Event("score").add("tokens", static_cast<std::int64_t>(tokens.size())).add("ns", ns).send();
}

inline void check_tokens(const std::vector<std::int64_t>& tokens, std::int64_t vocabulary) {
    for (std::size_t i = 0; i < tokens.size(); ++i) {
        if (tokens[i] < 0 || (vocabulary > 0 && tokens[i] >= vocabulary)) {
            throw std::runtime_error("token " + std::to_string(i) + " is " + std::to_string(tokens[i]) +
                                     "; the vocabulary has " + std::to_string(vocabulary) + " entries");
        }
    }
}

template <typename Decoder>
void work(Decoder& decoder, const Arguments& arguments, const std::vector<std::int64_t>& tokens) {
    check_tokens(tokens, decoder.vocabulary());
    if (arguments.mode == "generate") {
        generate(decoder, arguments, tokens);
    } else {
        score(decoder, arguments, tokens);
    }
}

inline void send_memory() {
    const std::optional<std::int64_t> resident = own_bytes("status", "VmRSS");
    std::optional<std::int64_t> peak = own_bytes("status", "VmHWM");
    if (peak && resident && *peak < *resident) peak = resident;  // the kernel sums them up at different moments
    // The kernel walks all pages for these, which takes milliseconds: nothing is timed any more.
    Event("memory")
        .add("peak_rss_bytes", peak)
        .add("rss_bytes", resident)
        .add("pss_bytes", own_bytes("smaps_rollup", "Pss"))
        .add("pss_file_bytes", own_bytes("smaps_rollup", "Pss_File"))
        .add("pss_anon_bytes", own_bytes("smaps_rollup", "Pss_Anon"))
        .send();
}

// Every end of a runner: the `end` event, or one `error` event and a non-zero exit code.
template <typename Run>
int report(const char* program, Run run) {
    try {
        run();
        Event("end").add("rc", 0).send();
        return 0;
    } catch (const std::exception& error) {
        try {
            Event("error").add("message", std::string(error.what())).send();
        } catch (const std::exception&) {
            std::fprintf(stderr, "%s: %s\n", program, error.what());
        }
        return 1;
    }
}

}  // namespace boa
