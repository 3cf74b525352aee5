// The level amx on emulated tiles: the emulation itself, the trial that admits the level, and what kernels leave behind
// on their thread. That their results are right is for the tests of the operators, which run here at this level.
#include <xmmintrin.h>

#include <algorithm>

#include "cpu/amx.h"
#include "cpu/linear8.h"
#include "cpu/tiled.h"
#include "emulated_tiles.h"
#include "testing.h"

using namespace testing;
using hb::TileConfig;

namespace {

// False for kernels whose instructions are trapped, on a processor that lacks the others that they need.
bool is_here() {
    return hb_level() != nullptr && strcmp(hb_level(), "amx") == 0;
}

TileConfig square_tiles() {
    TileConfig config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) config.rows[tile] = 16, config.row_bytes[tile] = 64;
    return config;
}

template <typename Body>
bool faults(const Body& body) {
    try {
        body();
    } catch (const Fault&) {
        return true;
    }
    return false;
}

bool refuses(const TileConfig& config) {
    TileMachine machine{};
    return faults([&] { machine.configure(&config); });
}

// sums [rows, columns] after one product of pairs of bfloat16, weights [rows, 2 * depth], x [2 * depth, columns].
std::vector<float> product(const std::vector<float>& weights, const std::vector<float>& x, int rows, int depth,
                           int columns, float start) {
    TileConfig config = square_tiles();
    for (const int tile : {0, 4}) config.rows[tile] = static_cast<uint8_t>(rows);
    for (const int tile : {0, 6}) config.row_bytes[tile] = static_cast<uint16_t>(4 * columns);
    config.row_bytes[4] = static_cast<uint16_t>(4 * depth), config.rows[6] = static_cast<uint8_t>(depth);
    std::vector<uint16_t> pairs(static_cast<size_t>(2 * depth * columns));
    for (int k = 0; k < 2 * depth; ++k) {
        for (int n = 0; n < columns; ++n) {
            pairs[static_cast<size_t>((k / 2 * columns + n) * 2 + k % 2)] =
                bfloat(x[static_cast<size_t>(k * columns + n)]);
        }
    }
    std::vector<float> sums(static_cast<size_t>(rows * columns), start);
    TileMachine machine{};
    machine.configure(&config);
    machine.load(0, sums.data(), 4 * columns);
    machine.load(4, bfloats(weights).data(), 4 * depth);
    machine.load(6, pairs.data(), 4 * columns);
    machine.dot_bfloat16(0, 4, 6);
    machine.store(0, sums.data(), 4 * columns);
    machine.release();
    return sums;
}

// Tiles that do one thing wrong.
struct TilesWithoutInt8 : EmulatedTiles {
    template <int Sums, int Weights, int X>
    static void dot_int8() {}
};
struct TilesThatSwap : EmulatedTiles {
    template <int Sums, int Weights, int X>
    static void dot_bfloat16() {
        EmulatedTiles::dot_bfloat16<Sums, X, Weights>();
    }
};

// 4-bit and int8 products of every kind, so that all kernels run; workers too. The outputs, one after another.
std::vector<uint16_t> run_kernels(int64_t M, int64_t N, int64_t K, const std::vector<uint16_t>& x,
                                  float absmax_of_all) {
    const std::vector<uint8_t> codes(static_cast<size_t>(N * K), 0x5b);
    const std::vector<float> absmax(static_cast<size_t>(N * K / 64 + N), absmax_of_all);
    std::vector<uint16_t> all;
    const auto keep = [&](hb_status status, const std::vector<uint16_t>& out) {
        EXPECT(status == HB_OK, "%d x %d x %d", (int)M, (int)N, (int)K);
        all.insert(all.end(), out.begin(), out.end());
    };
    for (const int64_t rule : {HB_OUTLIERS_VALUE, HB_OUTLIERS_BATCH, HB_OUTLIERS_ALL}) {
        std::vector<uint16_t> out = poisoned<uint16_t>(M * N);
        auto args = args_with<hb_linear8_args>(3);
        args.x = x.data(), args.x_dtype = HB_BFLOAT16, args.M = M, args.N = N, args.K = K, args.threshold = 2.0;
        args.codes = reinterpret_cast<const int8_t*>(codes.data()), args.absmax = absmax.data(), args.out = out.data();
        args.outlier_rule = rule;
        int64_t bytes = 0;
        EXPECT(hb_linear8_workspace(&args, &bytes) == HB_OK, "workspace");
        const Workspace workspace(bytes);
        workspace.give_to(args.call);
        const hb_status status = hb_linear8(&args);
        keep(status, out);
    }
    std::vector<uint16_t> out = poisoned<uint16_t>(M * N);
    auto args = args_with<hb_linear4_args>(3);
    args.x = x.data(), args.x_dtype = HB_BFLOAT16, args.M = M, args.N = N, args.K = K, args.packed = codes.data();
    args.format = HB_NF4, args.blocksize = 64, args.absmax = absmax.data(), args.out = out.data();
    int64_t bytes = 0;
    EXPECT(hb_linear4_workspace(&args, &bytes) == HB_OK, "workspace");
    const Workspace workspace(bytes);
    workspace.give_to(args.call);
    const hb_status status = hb_linear4(&args);
    keep(status, out);
    return all;
}

}  // namespace

TEST(emulated_tiles_multiply_as_defined) {
    for (int round = 0; round < 20; ++round) {
        const int rows = static_cast<int>(any_of({1, 7, 16})), depth = static_cast<int>(any_of({1, 5, 16}));
        const int columns = static_cast<int>(any_of({1, 3, 16}));
        const std::vector<float> weights = normal_values(rows * 2 * depth), x = normal_values(2 * depth * columns);
        const std::vector<float> sums = product(weights, x, rows, depth, columns, 0.5f);
        for (int m = 0; m < rows; ++m) {
            for (int n = 0; n < columns; ++n) {
                double want = 0.5, size = 0.5;
                for (int k = 0; k < 2 * depth; ++k) {
                    const double term = value_of(bfloat(weights[static_cast<size_t>(m * 2 * depth + k)]), 7) *
                                        value_of(bfloat(x[static_cast<size_t>(k * columns + n)]), 7);
                    want += term, size += std::fabs(term);
                }
                const double found = sums[static_cast<size_t>(m * columns + n)];
                EXPECT(std::fabs(found - want) <= 2e-6 * size, "%g, not %g", found, want);
            }
        }
    }
}

TEST(even_and_odd_places_are_added_up_apart) {
    // 2^24 + 1 is no float32, 1 - 2^24 is one.
    const std::vector<float> sums = product({0x1p24f, -0x1p24f, 1, 1}, {1, 1, 1, 1}, 1, 2, 1, 0);
    EXPECT(sums[0] == 1, "%g", sums[0]);
    EXPECT(product({1, 0}, {1, 1}, 1, 1, 1, 0x1p24f)[0] == 0x1p24f, "a tie goes to the even neighbour");
    EXPECT(product({3, 0}, {1, 1}, 1, 1, 1, 0x1p24f)[0] == 0x1p24f + 4, "a tie goes to the even neighbour");
}

TEST(subnormal_numbers_are_zeros_in_tiles) {
    EXPECT(product({0x1p-130f, 0}, {0x1p30f, 0}, 1, 1, 1, 0)[0] == 0, "a subnormal operand");
    EXPECT(product({0x1p-70f, 0}, {0x1p-70f, 0}, 1, 1, 1, 0)[0] == 0, "a subnormal product");
    EXPECT(product({0x1p-60f, 0}, {0x1p-60f, 0}, 1, 1, 1, 0)[0] == 0x1p-120f, "a normal product");
    EXPECT(product({0, 0}, {0, 0}, 1, 1, 1, 0x1p-130f)[0] == 0, "a subnormal sum");
}

TEST(integers_wrap_around_in_tiles) {
    const TileConfig config = square_tiles();
    TileMachine machine{};
    machine.configure(&config);
    int8_t weights[16][64], x[16][64];
    int32_t sums[16][16];
    memset(weights, -128, sizeof weights), memset(x, -128, sizeof x);
    for (auto& row : sums) {
        for (int32_t& sum : row) sum = 0x7fffffff;
    }
    machine.load(1, sums, 64), machine.load(2, weights, 64), machine.load(3, x, 64);
    machine.dot_int8(1, 2, 3);
    machine.store(1, sums, 64);
    EXPECT(sums[3][5] == static_cast<int32_t>(0x7fffffffu + 64 * 128 * 128), "%d", sums[3][5]);
}

TEST(what_a_processor_refuses_faults) {
    TileConfig config = square_tiles();
    EXPECT(!refuses(config), "eight whole tiles");
    config.palette = 2;
    EXPECT(refuses(config), "another palette");
    config = square_tiles(), config.rows[3] = 17;
    EXPECT(refuses(config), "17 rows");
    config = square_tiles(), config.row_bytes[0] = 68;
    EXPECT(refuses(config), "68 bytes");
    config = square_tiles(), config.rows[8] = 1, config.row_bytes[8] = 4;
    EXPECT(refuses(config), "a ninth tile");
    config = square_tiles(), config.rows[1] = 0;
    EXPECT(refuses(config), "bytes without rows");
    config = square_tiles(), config.reserved[5] = 1;
    EXPECT(refuses(config), "a reserved byte");

    char memory[1024] = {};
    TileMachine machine{};
    EXPECT(faults([&] { machine.zero(0); }), "not configured");
    EXPECT(faults([&] { machine.release(); }), "nothing to release");
    config = square_tiles();
    config.rows[7] = 0, config.row_bytes[7] = 0, config.rows[6] = 8, config.row_bytes[5] = 32, config.row_bytes[4] = 62;
    machine.configure(&config);
    EXPECT(faults([&] { machine.configure(&config); }), "configured twice");
    EXPECT(faults([&] { machine.load(7, memory, 64); }), "a tile without rows");
    EXPECT(faults([&] { machine.load(8, memory, 64); }), "a ninth tile");
    EXPECT(faults([&] { machine.dot_bfloat16(0, 0, 1); }), "one tile twice");
    EXPECT(faults([&] { machine.dot_bfloat16(0, 1, 6); }), "16 units against 8 rows");
    EXPECT(faults([&] { machine.dot_int8(0, 6, 1); }), "16 rows of sums, 8 of weights");
    EXPECT(faults([&] { machine.dot_int8(0, 1, 5); }), "16 columns of sums, 8 of x");
    EXPECT(faults([&] { machine.dot_int8(0, 1, 4); }), "half a unit");
    EXPECT(!faults([&] { machine.dot_int8(0, 1, 2); }), "16 by 16 by 16");
}

TEST(a_trial_tells_tiles_that_multiply_from_others) {
    EXPECT(hb::tiles_multiply<EmulatedTiles>(), "the emulation");
    EXPECT(!hb::tiles_multiply<TilesWithoutInt8>(), "no integers");
    EXPECT(!hb::tiles_multiply<TilesThatSwap>(), "operands swapped");
    EXPECT(!TileMachine::of_this_thread().is_configured(), "left configured");
}

TEST(kernels_release_every_tile_that_they_configure) {
    if (!is_here()) return;
    const int64_t before = TileMachine::configured();
    const int64_t shapes[][3] = {{1, 1, 64}, {0, 5, 64}, {3, 0, 64}, {40, 70, 640}, {2, 3, 0}};
    for (const auto& [M, N, K] : shapes) {
        run_kernels(M, N, K, bfloats(normal_values(M * K)), 1);
        EXPECT(!TileMachine::of_this_thread().is_configured(), "%d x %d x %d", (int)M, (int)N, (int)K);
        EXPECT(TileMachine::configured() == TileMachine::released(), "%d x %d x %d", (int)M, (int)N, (int)K);
    }
    EXPECT(TileMachine::configured() > before, "no tile was used");
}

TEST(a_share_of_no_weight_rows_leaves_no_tiles_behind) {
    if (!is_here()) return;
    hb::DecodedCall call{};
    call.M = 1, call.N = 16, call.K = 64, call.weight.blocksize = 64;
    hb::TiledJob job{};
    job.call = &call, job.rows = 1, job.blocks = hb::TileBlocks(1, 128);
    hb::kTiledAmx.codes4.run(job, 1, 1, nullptr);
    hb::kTiledAmx.codes8.run(job, 0, 0, nullptr);
    hb_linear8_args args{};
    args.M = 1, args.N = 32, args.K = 64;
    hb::Job8 job8{};
    job8.args = &args, job8.rows = 1, job8.blocks = hb::TileBlocks(1, 64);
    hb::kLinear8Amx.run(job8, 1, 1, nullptr);
    EXPECT(!TileMachine::of_this_thread().is_configured(), "left configured");
    EXPECT(TileMachine::configured() == TileMachine::released(), "left configured");
}

TEST(a_callers_treatment_of_subnormal_numbers_stays_and_does_not_reach_tiles) {
    if (!is_here()) return;
    constexpr int64_t kM = 20, kN = 35, kK = 192;
    const std::vector<uint16_t> x = bfloats(normal_values(kM * kK));
    for (const float absmax : {1.0f, 0x1p-120f, 0x1p-128f}) {
        const std::vector<uint16_t> plain = run_kernels(kM, kN, kK, x, absmax);
        const unsigned before = _mm_getcsr();
        _mm_setcsr(before | 0x8040);  // subnormal results and operands are zeros
        const unsigned mine = _mm_getcsr();
        const std::vector<uint16_t> flushed = run_kernels(kM, kN, kK, x, absmax);
        // The flags of exceptions that occurred are the processor's to set.
        EXPECT((_mm_getcsr() & ~0x3fu) == (mine & ~0x3fu), "%x became %x", mine, _mm_getcsr());
        _mm_setcsr(before);
        // Sums of int8 codes are scaled, as at every level, by float32 products that heed it; the last output, of 4-bit
        // weights, is what tiles made of decoded values, subnormal ones among them.
        const int64_t from = absmax == 1 ? 0 : static_cast<int64_t>(plain.size()) - kM * kN;
        EXPECT(std::equal(plain.begin() + from, plain.end(), flushed.begin() + from), "absmax %g", (double)absmax);
    }
}
