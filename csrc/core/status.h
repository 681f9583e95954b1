// How a function of a C interface fails: it returns a status, and the message that goes with it can be asked for.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace pylo {

// About the last failure in this thread. Libraries are compiled with hidden symbols, so each has messages of its own.
inline thread_local char message[512] = "";

// Formats the message and returns the status.
__attribute__((format(printf, 2, 3))) inline int fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    std::vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

}  // namespace pylo
