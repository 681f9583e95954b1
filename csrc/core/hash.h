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

// Four interleaved hashes, as a table is hashed at every stage of a step and multiplications of one hash wait for each
// other.
inline uint64_t hash(uint64_t seed, const void *data, size_t bytes) {
    const char *from = (const char *)data;
    uint64_t h[4] = {seed, seed ^ 0x9E3779B97F4A7C15u, seed + 0xBF58476D1CE4E5B9u, ~seed};
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t word = 0;
        memcpy(&word, from + i, bytes - i < 8 ? bytes - i : 8);
        uint64_t &x = h[i / 8 % 4];
        x = mix(x, word);
    }
    uint64_t all = bytes;
    for (uint64_t x : h) all = (all ^ x) * 0xD6E8FEB86659FD93u, all ^= all >> 32;
    return all;
}

}  // namespace pylo
