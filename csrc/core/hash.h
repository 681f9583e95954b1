// Hashes that tell what has changed. They guard against mistakes, not against malice.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace pylo {

inline uint64_t mix(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9FB21C651E98DF25u;
    return hash ^ hash >> 32;
}

// Eight interleaved hashes, as a table is hashed at every stage of a step and multiplications of one hash wait for each
// other.
inline uint64_t hash(uint64_t seed, const void *data, size_t bytes) {
    constexpr size_t LANES = 8, WORD = sizeof(uint64_t);
    const char *from = (const char *)data;
    uint64_t h[LANES];
    for (size_t lane = 0; lane < LANES; ++lane) h[lane] = seed + lane * 0x9E3779B97F4A7C15u;
    size_t at = 0;
    for (; at + LANES * WORD <= bytes; at += LANES * WORD)
        for (size_t lane = 0; lane < LANES; ++lane) {
            uint64_t word;
            memcpy(&word, from + at + lane * WORD, WORD);
            h[lane] = mix(h[lane], word);
        }
    for (size_t lane = 0; at < bytes; at += WORD, ++lane) {
        uint64_t word = 0;
        memcpy(&word, from + at, bytes - at < WORD ? bytes - at : WORD);
        h[lane] = mix(h[lane], word);
    }
    uint64_t all = bytes;
    for (uint64_t x : h) all = (all ^ x) * 0xD6E8FEB86659FD93u, all ^= all >> 32;
    return all;
}

}  // namespace pylo
