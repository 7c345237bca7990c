// The engine under a fuzzer, to be built with sanitizers: every instruction set's scanner against the scalar oracle,
// the encoder against the definition of BPE, several threads on one vocabulary. Usage: fuzz <rounds> <seed>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bpe/encoder.h"
#include "bpe/merge.h"
#include "bpe/trainer.h"
#include "bpe/unicode.h"

using namespace fastformer::bpe;
namespace unicode = fastformer::unicode;

namespace {

std::mt19937_64 rng;

size_t below(size_t n) { return rng() % n; }

void append(std::string& s, uint32_t point) {
    if (point < 0x80) {
        s += static_cast<char>(point);
    } else if (point < 0x800) {
        s += {static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 63))};
    } else if (point < 0x10000) {
        s += {static_cast<char>(0xE0 | point >> 12), static_cast<char>(0x80 | (point >> 6 & 63)),
              static_cast<char>(0x80 | (point & 63))};
    } else {
        s += {static_cast<char>(0xF0 | point >> 18), static_cast<char>(0x80 | (point >> 12 & 63)),
              static_cast<char>(0x80 | (point >> 6 & 63)), static_cast<char>(0x80 | (point & 63))};
    }
}

std::string piece() {
    static const char* const kFixed[] = {"'s", "'S", "'ll", "'Ve", "'\u017f", "'",  " ",  "  ", "\n", "\r\n", "\t",
                                         "a",  "Ab", "the", " of", "12",      "345", "!", "...", "/",  "\u00a0",
                                         "\u3000", "\u4e16\u754c", "\u306e", "\u30fb", "\u0301", "\u01c5", "e\u0301"};
    std::string s;
    switch (below(8)) {
        case 0: append(s, static_cast<uint32_t>(below(0x80))); break;
        case 1: append(s, static_cast<uint32_t>(0x80 + below(0x780))); break;
        case 2: append(s, static_cast<uint32_t>(0x800 + below(0xD000 - 0x800))); break;
        case 3: append(s, static_cast<uint32_t>(0x10000 + below(0x100000))); break;
        default: s = kFixed[below(sizeof kFixed / sizeof kFixed[0])];
    }
    size_t repeat = below(40) ? 1 : below(below(8) ? 80 : 9000) + 1;
    std::string out;
    for (size_t i = 0; i < repeat; i++) out += s;
    return out;
}

std::string text(size_t pieces) {
    std::string s;
    for (size_t i = 0; i < pieces; i++) s += piece();
    return s;
}

// An allocation of exactly the text's size, so that a read past its end is seen.
struct Exact {
    explicit Exact(const std::string& s) : size(s.size()), data(new uint8_t[s.size()]) {
        std::copy(s.begin(), s.end(), data.get());
    }
    size_t size;
    std::unique_ptr<uint8_t[]> data;
};

[[noreturn]] void fail(const char* what, const std::string& s) {
    std::fprintf(stderr, "%s differs on %zu bytes:", what, s.size());
    for (size_t i = 0; i < s.size() && i < 400; i++) std::fprintf(stderr, " %02x", static_cast<uint8_t>(s[i]));
    std::fprintf(stderr, "\n");
    std::exit(1);
}

std::vector<uint32_t> scan(Pattern pattern, Isa isa, const Exact& x, size_t capacity) {
    std::vector<uint32_t> ends, some(capacity);
    for (size_t pos = 0; pos < x.size;) {
        size_t count = Scanner::get(pattern, isa)(x.data.get(), x.size, pos, some.data(), capacity);
        ends.insert(ends.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(count));
    }
    return ends;
}

std::vector<uint32_t> define(const Vocab& vocab, const uint8_t* p, const std::vector<uint32_t>& ends) {
    std::vector<uint32_t> ids, parts;
    size_t start = 0;
    for (uint32_t end : ends) {
        uint32_t whole = vocab.find_piece(p + start, end - start);
        parts.assign(p + start, p + end);
        if (whole != kNone)
            parts.assign(1, whole);
        else
            merge_heap(vocab.pairs(), parts, [](uint32_t token) { return token; });
        for (uint32_t token : parts) ids.push_back(vocab.external(token));
        start = end;
    }
    return ids;
}

// A vocabulary learned from the fuzzer's own texts; `shuffle` breaks the order of the ranks.
void learn(Vocab& vocab, bool shuffle) {
    WordCounts words;
    for (int i = 0; i < 60; i++) {
        std::string s = text(60);
        words.add_text(Pattern::kCl100k, best_isa(), reinterpret_cast<const uint8_t*>(s.data()), s.size());
    }
    TrainResult result = train(words, {700, 0, 64, {}}, [](size_t) { return true; });
    std::vector<Span> spans;
    std::vector<uint32_t> ids;
    for (const std::string& token : result.tokens) {
        spans.push_back({reinterpret_cast<const uint8_t*>(token.data()), token.size()});
        ids.push_back(static_cast<uint32_t>(ids.size() * 3));
    }
    if (shuffle) std::shuffle(ids.begin(), ids.end(), rng);
    vocab.build(spans, ids, nullptr, true);
}

}  // namespace

int main(int argc, char** argv) {
    size_t rounds = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 100;
    rng.seed(argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 0);
    Vocab ordered, shuffled;
    learn(ordered, false);
    learn(shuffled, true);
    if (!ordered.monotone() || shuffled.monotone()) fail("the order of ranks", "");
    std::vector<std::pair<Vocab*, std::unique_ptr<Encoder>>> encoders;
    for (Isa isa : {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512})
        for (Vocab* vocab : {&ordered, &shuffled})
            if (has_isa(isa)) encoders.emplace_back(vocab, Encoder::make(*vocab, isa));
    for (size_t round = 0; round < rounds; round++) {
        std::string s = text(1 + below(below(10) ? 20 : 400));
        Exact x(s);
        for (int p = 0; p < static_cast<int>(Pattern::kCount); p++) {
            Pattern pattern = static_cast<Pattern>(p);
            std::vector<uint32_t> want = scan(pattern, Isa::kScalar, x, 512);
            for (Isa isa : {Isa::kNeon, Isa::kAvx2, Isa::kAvx512})
                if (has_isa(isa) && scan(pattern, isa, x, below(2) ? 512 : 16384) != want) fail("a scanner", s);
            for (auto& [vocab, encoder] : encoders) {
                if (vocab == &shuffled && pattern == Pattern::kWhole && s.size() > 4000) continue;
                IdBuffer out;
                encoder->encode(pattern, x.data.get(), x.size, out);
                std::vector<uint32_t> got(out.data(), out.data() + out.size());
                if (got != define(*vocab, x.data.get(), want)) fail("an encoding", s);
            }
        }
        // Many short texts at once: as each for itself.
        std::vector<std::unique_ptr<Exact>> some;
        std::vector<Span> spans;
        for (size_t i = below(40); i > 0; i--) {
            some.push_back(std::make_unique<Exact>(text(below(8))));
            spans.push_back({some.back()->data.get(), some.back()->size});
        }
        for (auto& [vocab, encoder] : encoders) {
            IdBuffer all, counts, alone;
            encoder->encode_many(Pattern::kCl100k, spans.data(), spans.size(), all, counts);
            if (counts.size() != spans.size()) fail("the number of texts", s);
            for (size_t i = 0; i < spans.size(); i++) {
                size_t before = alone.size();
                encoder->encode(Pattern::kCl100k, spans[i].data, spans[i].size, alone);
                if (alone.size() - before != counts.data()[i]) fail("the length of a text among many", s);
            }
            if (!std::equal(alone.data(), alone.data() + alone.size(), all.data(), all.data() + all.size()))
                fail("a text among many", s);
        }
        // Bytes of any kind: validation, and one pretoken of them.
        std::string broken = s.substr(0, 200);
        if (broken.empty()) continue;
        broken[below(broken.size())] = static_cast<char>(rng());
        Exact y(broken);
        size_t valid = unicode::valid_utf8_prefix(y.data.get(), y.size);
        if (valid > y.size) fail("the valid prefix", broken);
        IdBuffer out;
        encoders[0].second->encode_piece(y.data.get(), y.size, out);
        std::vector<uint32_t> got(out.data(), out.data() + out.size());
        if (got != define(ordered, y.data.get(), {static_cast<uint32_t>(y.size)})) fail("bytes", broken);
    }
    std::vector<std::string> texts;
    for (int i = 0; i < 4; i++) texts.push_back(text(300));
    std::vector<std::thread> threads;
    for (const std::string& s : texts)
        threads.emplace_back([&ordered, &s] {
            std::unique_ptr<Encoder> encoder = Encoder::make(ordered, best_isa());
            for (int k = 0; k < 3; k++) {
                IdBuffer out;
                encoder->encode(Pattern::kO200k, reinterpret_cast<const uint8_t*>(s.data()), s.size(), out);
            }
        });
    for (std::thread& thread : threads) thread.join();
    std::printf("ok: %zu rounds\n", rounds);
    return 0;
}
