// LC_CHECK: an argument that breaks a rule becomes a ValueError in Python.
#pragma once

#include <stdexcept>
#include <string>

#define LC_CHECK(condition, message)                            \
    do {                                                        \
        if (!(condition)) throw std::invalid_argument(message); \
    } while (false)
