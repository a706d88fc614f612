/* A plugin of QEMU's user emulation that counts the instructions of the emulated program.
 *
 * Each time the program writes to its standard output, the count so far goes to the file of the argument `out`, a number
 * and a newline. A runner writes each event with one call, so that the differences are the instructions between events.
 * One thread only: a second one that ran since the write before makes the count worthless, and the line `threads` stands
 * in its place. Those that are gone before the first write (a pool that is made anew with fewer) do not matter: only
 * differences are read.
 *
 * QEMU's header is in no package, so what is used of its plugin interface (version 1) is declared here.
 */
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };

typedef void (*vcpu_callback)(qemu_plugin_id_t id, unsigned int vcpu);
typedef void (*translation_callback)(qemu_plugin_id_t id, struct qemu_plugin_tb *block);
typedef void (*syscall_callback)(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2,
                                 uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8);

void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t id, vcpu_callback callback);
void qemu_plugin_register_vcpu_exit_cb(qemu_plugin_id_t id, vcpu_callback callback);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, translation_callback callback);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t id, syscall_callback callback);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, enum qemu_plugin_op op, void *counter,
                                              uint64_t amount);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { WRITE = 64, STANDARD_OUTPUT = 1 }; /* write(2) on 64-bit ARM */

static uint64_t executed;
static int out = -1;
static int threads;      /* that live */
static int several;      /* have lived since the last write */
static int written;      /* at least once */

static void report(const char *line) {
    const size_t length = strlen(line);
    if (write(out, line, length) != (ssize_t)length) out = -1; /* a file that ends early is taken for none */
}

static void on_thread(qemu_plugin_id_t id, unsigned int vcpu) {
    (void)id, (void)vcpu;
    if (__atomic_add_fetch(&threads, 1, __ATOMIC_SEQ_CST) > 1) __atomic_store_n(&several, 1, __ATOMIC_SEQ_CST);
}

static void on_thread_end(qemu_plugin_id_t id, unsigned int vcpu) {
    (void)id, (void)vcpu;
    __atomic_sub_fetch(&threads, 1, __ATOMIC_SEQ_CST);
}

static void on_block(qemu_plugin_id_t id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, QEMU_PLUGIN_INLINE_ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void on_syscall(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                       uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
    (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number != WRITE || a1 != STANDARD_OUTPUT) return;
    const int now = __atomic_load_n(&threads, __ATOMIC_SEQ_CST) > 1;
    const int since = __atomic_exchange_n(&several, now, __ATOMIC_SEQ_CST);
    char line[24] = "threads\n";
    if (!now && !(since && written)) snprintf(line, sizeof line, "%llu\n", (unsigned long long)executed);
    written = 1;
    report(line);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
    (void)info;
    for (int i = 0; i < argc; ++i) {
        if (strncmp(argv[i], "out=", 4) == 0) out = open(argv[i] + 4, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    }
    if (out < 0) {
        fprintf(stderr, "the instruction counter needs out=FILE that it can write\n");
        return 1;
    }
    qemu_plugin_register_vcpu_init_cb(id, on_thread);
    qemu_plugin_register_vcpu_exit_cb(id, on_thread_end);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_block);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    return 0;
}
