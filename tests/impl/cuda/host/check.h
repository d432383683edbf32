// A check that says where it failed and what the values were, for the proof programs.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK_THAT(condition, ...)                                         \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::printf("%s:%d: %s does not hold: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)
