#include "cpu/parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pyqe::cpu {
namespace {

bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
void note_fork() { forked = true; }
const int registered = pthread_atfork(nullptr, nullptr, note_fork);
#endif

}  // namespace

int usable_threads(int threads) { return forked ? 1 : threads; }

}  // namespace pyqe::cpu
