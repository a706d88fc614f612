// The runner's output: one JSON object per line on stdout, each written and flushed at once.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace boa {

// Nanoseconds of a monotonic clock.
inline std::int64_t now_ns() {
    using clock = std::chrono::steady_clock;
    return std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now().time_since_epoch()).count();
}

// Length of the well-formed UTF-8 sequence at `at`, or 0.
inline std::size_t utf8_length(std::string_view text, std::size_t at) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char lead = byte(at);
    std::size_t length = 0;
    unsigned char low = 0x80;
    unsigned char high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
        length = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        length = 3;
        if (lead == 0xE0) low = 0xA0;
        if (lead == 0xED) high = 0x9F;  // no surrogates
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        length = 4;
        if (lead == 0xF0) low = 0x90;
        if (lead == 0xF4) high = 0x8F;
    }
    if (length == 0 || at + length > text.size()) return 0;
    if (byte(at + 1) < low || byte(at + 1) > high) return 0;
    for (std::size_t i = 2; i < length; ++i) {
        if ((byte(at + i) & 0xC0) != 0x80) return 0;
    }
    return length;
}

// `text` as a JSON string; bytes that are not UTF-8 become U+FFFD.
inline std::string quote(std::string_view text) {
    std::string out = "\"";
    for (std::size_t i = 0; i < text.size(); ++i) {
        const unsigned char c = static_cast<unsigned char>(text[i]);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += static_cast<char>(c);
        } else if (c < 0x20 || c == 0x7F) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
            out += escaped;
        } else if (c < 0x80) {
            out += static_cast<char>(c);
        } else if (const std::size_t length = utf8_length(text, i)) {
            out.append(text.substr(i, length));
            i += length - 1;
        } else {
            out += "\\ufffd";
        }
    }
    return out + '"';
}

// One event under construction; `send` prints it.
class Event {
  public:
    explicit Event(std::string_view name) : line_("{\"event\":" + quote(name)) {}

    Event& add(std::string_view key, std::int64_t value) { return raw(key, std::to_string(value)); }
    Event& add(std::string_view key, int value) { return raw(key, std::to_string(value)); }
    Event& add(std::string_view key, bool value) { return raw(key, value ? "true" : "false"); }
    Event& add(std::string_view key, const char* value) { return raw(key, quote(value)); }
    Event& add(std::string_view key, const std::string& value) { return raw(key, quote(value)); }
    Event& add(std::string_view key, std::optional<std::int64_t> value) {
        return raw(key, value ? std::to_string(*value) : "null");
    }

    // Throws where stdout is closed or full: an unseen event is a failed run.
    void send() {
        line_ += "}\n";
        if (std::fwrite(line_.data(), 1, line_.size(), stdout) != line_.size() || std::fflush(stdout) != 0) {
            throw std::runtime_error("stdout cannot be written");
        }
    }

  private:
    Event& raw(std::string_view key, const std::string& value) {
        line_ += "," + quote(key) + ":" + value;
        return *this;
    }

    std::string line_;
};

// A "Name:  123 kB" line of a file below /proc/self in bytes; nothing where the system does not say.
inline std::optional<std::int64_t> own_bytes(const char* file, std::string_view name) {
    std::ifstream status(std::string("/proc/self/") + file);
    std::string line;
    while (std::getline(status, line)) {
        if (line.size() > name.size() && line.compare(0, name.size(), name) == 0 && line[name.size()] == ':') {
            long long kib = 0;
            if (std::sscanf(line.c_str() + name.size() + 1, "%lld kB", &kib) == 1 && kib >= 0) {
                return static_cast<std::int64_t>(kib) * 1024;
            }
        }
    }
    return std::nullopt;
}

}  // namespace boa
