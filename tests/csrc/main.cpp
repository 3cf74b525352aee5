// Runs every registered test; exit code 1 if anything failed. An argument is the seed to repeat a run with, a second
// one a part of the names of the tests to run. Exit code HALFBYTE_SKIPPED, and no test, where the level that the
// environment asks for is not on this machine.
#include "testing.h"

namespace testing {
Registered* first_test = nullptr;
int failures = 0;
std::mt19937_64 generator;
}  // namespace testing

extern "C" int header_abi_version(void);

TEST(the_header_in_c_is_the_librarys) {
    EXPECT(header_abi_version() == hb_abi_version(), "%d against %d", header_abi_version(), hb_abi_version());
}

int main(int argc, char** argv) {
    if (hb_level() == nullptr) {
        puts("skipped: this machine has no such level");
        return HALFBYTE_SKIPPED;
    }
    const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : std::random_device{}();
    const char* const part = argc > 2 ? argv[2] : "";
    printf("seed %llu\n", static_cast<unsigned long long>(seed));
    int tests = 0;
    for (testing::Registered* test = testing::first_test; test != nullptr; test = test->next) {
        if (strstr(test->name, part) == nullptr) continue;
        ++tests;
        testing::generator.seed(seed);
        const int before = testing::failures;
        test->run();
        printf("%s %s\n", testing::failures == before ? "ok    " : "FAILED", test->name);
    }
    printf("%d tests, %d failed expectations\n", tests, testing::failures);
    return testing::failures == 0 ? 0 : 1;
}
