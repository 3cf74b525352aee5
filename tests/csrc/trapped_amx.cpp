// The shipped kernels of the level amx, to the last byte of their code, on a processor with AVX-512 but no AMX: it
// refuses each tile instruction by a signal, whose handler reads the instruction and carries it out on emulated tiles.
//
// Takes the place of cpu/amx.cpp in the program that it is part of, and says that tiles are there. For x86-64 Linux.
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "cpu/amx.h"
#include "emulated_tiles.h"

namespace {

constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// One instruction with a VEX prefix of three bytes, which all of these have.
struct Instruction {
    int prefix, map, opcode, mod, reg, rm, vvvv;
    bool is_wide;      // W, or 256 bits
    uint8_t* address;  // of a memory operand
    int64_t index;     // the value of its index register: the stride
    bool has_index;
    int64_t length;

    Instruction(const uint8_t* at, const greg_t* registers) {
        const auto value = [registers](int which) { return static_cast<int64_t>(registers[kRegisters[which]]); };
        map = at[1] & 31, opcode = at[3], prefix = at[2] & 3;
        is_wide = (at[2] & 0x84) != 0;
        vvvv = ~(at[2] >> 3) & 15;
        const int r = at[1] & 0x80 ? 0 : 8, x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;
        mod = at[4] >> 6, reg = (at[4] >> 3 & 7) + r, rm = (at[4] & 7) + b;
        address = nullptr, index = 0, has_index = false, length = 5;
        if (mod == 3) return;
        int64_t sum = 0;
        bool has_base = true;
        if ((at[4] & 7) == 4) {
            const uint8_t sib = at[length++];
            const int scaled = (sib >> 3 & 7) + x, base = (sib & 7) + b;
            has_index = scaled != 4;
            if (has_index) index = value(scaled) << (sib >> 6);
            has_base = mod != 0 || (sib & 7) != 5;
            if (has_base) sum = value(base);
        } else if (mod == 0 && (at[4] & 7) == 5) {
            has_base = false;
            sum = reinterpret_cast<int64_t>(at) + 9;  // relative to what follows
        } else {
            sum = value(rm);
        }
        if (mod == 1) {
            sum += static_cast<int8_t>(at[length++]);
        } else if (mod == 2 || !has_base) {
            int32_t displacement;
            memcpy(&displacement, at + length, sizeof displacement);
            sum += displacement, length += 4;
        }
        address = reinterpret_cast<uint8_t*>(sum);
    }
};

// Prefixes: none 0, 66 1, F3 2, F2 3. Whether it was an instruction on tiles.
bool execute(const Instruction& i, testing::TileMachine& tiles) {
    if (i.map != 2 || i.is_wide) return false;
    const bool is_memory = i.mod != 3;
    const int which = i.opcode << 4 | i.prefix;
    if (which == 0x490 && is_memory && i.reg == 0) {  // LDTILECFG
        tiles.configure(i.address);
    } else if (which == 0x490 && !is_memory && i.reg == 0) {  // TILERELEASE
        tiles.release();
    } else if (which == 0x493 && !is_memory) {  // TILEZERO
        tiles.zero(i.reg);
    } else if (which == 0x4b3 && i.has_index) {  // TILELOADD
        tiles.load(i.reg, i.address, i.index);
    } else if (which == 0x4b2 && i.has_index) {  // TILESTORED
        tiles.store(i.reg, i.address, i.index);
    } else if (which == 0x5c2 && !is_memory) {  // TDPBF16PS
        tiles.dot_bfloat16(i.reg, i.rm, i.vvvv);
    } else if (which == 0x5e3 && !is_memory) {  // TDPBSSD
        tiles.dot_int8(i.reg, i.rm, i.vvvv);
    } else {
        return false;
    }
    return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
    greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const uint8_t* const at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    if (at[0] == 0xc4) {
        try {
            const Instruction instruction(at, registers);
            if (execute(instruction, testing::TileMachine::of_this_thread())) {
                registers[REG_RIP] += instruction.length;
                return;
            }
        } catch (const testing::Fault& fault) {
            fprintf(stderr, "a tile instruction faults: %s\n", fault.what);
            abort();
        }
    }
    signal(SIGILL, SIG_DFL);  // no instruction on tiles: it comes here once more, and ends the process
}

__attribute__((constructor)) void trap() {
    struct sigaction action{};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" int __real_pthread_sigmask(int how, const sigset_t* set, sigset_t* before);

// Workers of the pool block all signals; the one for an instruction would then end the process. The linker puts this in
// the place of pthread_sigmask.
extern "C" int __wrap_pthread_sigmask(int how, const sigset_t* set, sigset_t* before) {
    sigset_t others = *set;
    if (how == SIG_BLOCK) sigdelset(&others, SIGILL);
    return __real_pthread_sigmask(how, &others, before);
}

// A trial that fails here must not pass for a processor without tiles. One that has them takes configurations without
// asking, which the emulation would then miss; there the tests of the level run the same code on the processor.
bool hb::try_amx() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kTile = 1u << 24;  // leaf 7, edx
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) != 0) return false;
    if (tiles_multiply<AmxTiles>()) return true;
    fprintf(stderr, "trapped tiles multiply wrongly\n");
    abort();
}
