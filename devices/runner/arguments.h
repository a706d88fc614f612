// The command line that every runner shares, checked completely before anything is loaded.
#pragma once

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace boa {

struct Arguments {
    std::string model;
    std::string tokens;
    std::string mode;
    std::string form;
    std::string logits;
    std::string profile;  // where to write an operator profile; empty for none
    int new_tokens = 0;
    int warmup = 0;
    int repeats = 1;
    int threads = 1;
    std::vector<int> cores;  // to run on; empty for any
    int prefill = 0;  // the most tokens of one call; 0 where it is not given
    std::vector<std::pair<std::string, std::string>> config;
};

inline int parse_int(const std::string& flag, const std::string& text, int low, int high) {
    int value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || value < low || value > high) {
        throw std::invalid_argument(flag + " is '" + text + "'; it must be a whole number from " +
                                    std::to_string(low) + " to " + std::to_string(high));
    }
    return value;
}

// "4,5,6": numbers of CPU cores.
inline std::vector<int> parse_cores(const std::string& flag, const std::string& text) {
    std::vector<int> cores;
    for (std::size_t start = 0; start <= text.size();) {
        const std::size_t comma = std::min(text.find(',', start), text.size());
        cores.push_back(parse_int(flag, text.substr(start, comma - start), 0, CPU_SETSIZE - 1));
        start = comma + 1;
    }
    return cores;
}

// Has this process, and every thread that it starts from now on, run on these cores only.
inline void stay_on(const std::vector<int>& cores) {
    if (cores.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int core : cores) CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0) {
        throw std::runtime_error(std::string("--cores: the system refuses (") + std::strerror(errno) +
                                 "); name cores that are there and allowed");
    }
}

// How many cores this process may run on.
inline int allowed_cores() {
    cpu_set_t set;
    CPU_ZERO(&set);
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
}

// `forms`: those that the runner knows; the first is meant where none is given. `optional`: flags that not every runner
// has, of --prefill and --profile.
inline Arguments parse_arguments(int argc, char** argv, const std::vector<std::string>& forms,
                                 const std::set<std::string>& optional = {}) {
    constexpr int kMany = 1 << 24;
    Arguments out;
    out.form = forms.front();
    std::set<std::string> seen;
    for (int i = 1; i < argc; i += 2) {
        const std::string flag = argv[i];
        if (i + 1 >= argc) throw std::invalid_argument(flag + " needs a value");
        const std::string value = argv[i + 1];
        if (flag != "--config" && !seen.insert(flag).second) throw std::invalid_argument(flag + " is given twice");
        if (flag == "--model") {
            out.model = value;
        } else if (flag == "--tokens") {
            out.tokens = value;
        } else if (flag == "--mode") {
            out.mode = value;
        } else if (flag == "--form") {
            if (std::find(forms.begin(), forms.end(), value) == forms.end()) {
                std::string known = forms.front();
                for (std::size_t i = 1; i < forms.size(); ++i) known += " or " + forms[i];
                throw std::invalid_argument("--form is '" + value + "'; it must be " + known);
            }
            out.form = value;
        } else if (flag == "--logits") {
            out.logits = value;
        } else if (flag == "--new-tokens") {
            out.new_tokens = parse_int(flag, value, 1, kMany);
        } else if (flag == "--warmup") {
            out.warmup = parse_int(flag, value, 0, kMany);
        } else if (flag == "--repeats") {
            out.repeats = parse_int(flag, value, 1, kMany);
        } else if (flag == "--threads") {
            out.threads = parse_int(flag, value, 1, 1024);
        } else if (flag == "--cores") {
            out.cores = parse_cores(flag, value);
        } else if (flag == "--prefill" && optional.count(flag)) {
            out.prefill = parse_int(flag, value, 1, kMany);
        } else if (flag == "--profile" && optional.count(flag)) {
            out.profile = value;
        } else if (flag == "--config") {
            const std::size_t equals = value.find('=');
            if (equals == std::string::npos || equals == 0) {
                throw std::invalid_argument("--config is '" + value + "'; it must be KEY=VALUE");
            }
            out.config.emplace_back(value.substr(0, equals), value.substr(equals + 1));
        } else {
            throw std::invalid_argument("unknown argument '" + flag + "'");
        }
    }
    for (const char* flag : {"--model", "--tokens", "--mode"}) {
        if (!seen.count(flag)) throw std::invalid_argument(std::string(flag) + " is missing");
    }
    const auto require = [&](const char* flag, bool wanted) {
        if (wanted != (seen.count(flag) > 0)) {
            throw std::invalid_argument(std::string(flag) + (wanted ? " is needed" : " has no meaning") + " with --mode " +
                                        out.mode);
        }
    };
    if (out.mode == "generate") {
        require("--new-tokens", true);
        require("--logits", false);
    } else if (out.mode == "score") {
        require("--logits", true);
        for (const char* flag : {"--new-tokens", "--warmup", "--repeats"}) require(flag, false);
    } else {
        throw std::invalid_argument("--mode is '" + out.mode + "'; it must be generate or score");
    }
    return out;
}

// Little-endian int64 ids. Throws where the file is missing, empty or torn.
inline std::vector<std::int64_t> read_tokens(const std::string& path) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token and logit files are little-endian");
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw std::runtime_error(path + ": the token file cannot be opened");
    const std::streamoff size = file.tellg();
    if (size <= 0 || size % 8 != 0) {
        throw std::runtime_error(path + ": " + std::to_string(size) + " bytes are not a whole, non-zero number of int64 ids");
    }
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(size) / 8);
    file.seekg(0);
    file.read(reinterpret_cast<char*>(tokens.data()), size);
    if (!file) throw std::runtime_error(path + ": the token file cannot be read");
    return tokens;
}

}  // namespace boa
