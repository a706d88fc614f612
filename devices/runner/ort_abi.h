// The part of ONNX Runtime's C interface that this runner calls, declared by slot number.
//
// ONNX Runtime hands out a table of function pointers whose order never changes: new versions only append. So a program
// that knows the slots of the functions it calls runs on any later library. Slots used here all belong to the part
// fixed by version 5 of the interface; the assertions below keep the numbers honest.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct Env;
struct SessionOptions;
struct Session;
struct RunOptions;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct MemoryInfo;
struct Allocator;

constexpr std::uint32_t kApiVersion = 16;

constexpr int kElementFloat = 1;
constexpr int kElementInt8 = 3;
constexpr int kElementInt64 = 7;
constexpr int kLogWarning = 2;
constexpr int kOptimizeAll = 99;
constexpr int kDeviceAllocator = 0;
constexpr int kDefaultMemory = 0;

using Slot = void (*)();

struct Api {
    Slot slots_0[2];
    const char* (*error_message)(const Status*);                                                        // 2
    Status* (*create_env)(int log_level, const char* log_id, Env** out);                                // 3
    Slot slots_4[2];
    Status* (*disable_telemetry)(const Env*);                                                           // 6
    Status* (*create_session)(const Env*, const char* path, const SessionOptions*, Session** out);      // 7
    Slot slots_8[1];
    Status* (*run)(Session*, const RunOptions*, const char* const* input_names, const Value* const* inputs,
                   std::size_t input_count, const char* const* output_names, std::size_t output_count,
                   Value** outputs);                                                                    // 9
    Status* (*create_session_options)(SessionOptions** out);                                            // 10
    Slot slots_11[3];
    Status* (*enable_profiling)(SessionOptions*, const char* prefix);                                   // 14
    Slot slots_15[8];
    Status* (*set_optimization_level)(SessionOptions*, int level);                                      // 23
    Status* (*set_intra_op_threads)(SessionOptions*, int threads);                                      // 24
    Status* (*set_inter_op_threads)(SessionOptions*, int threads);                                      // 25
    Slot slots_26[4];
    Status* (*input_count)(const Session*, std::size_t* out);                                           // 30
    Status* (*output_count)(const Session*, std::size_t* out);                                          // 31
    Slot slots_32[1];
    Status* (*input_type)(const Session*, std::size_t index, TypeInfo** out);                           // 33
    Status* (*output_type)(const Session*, std::size_t index, TypeInfo** out);                          // 34
    Slot slots_35[1];
    Status* (*input_name)(const Session*, std::size_t index, Allocator*, char** out);                   // 36
    Status* (*output_name)(const Session*, std::size_t index, Allocator*, char** out);                  // 37
    Slot slots_38[10];
    Status* (*create_tensor)(Allocator*, const std::int64_t* shape, std::size_t rank, int type, Value** out);  // 48
    Status* (*wrap_tensor)(const MemoryInfo*, void* data, std::size_t bytes, const std::int64_t* shape,
                           std::size_t rank, int type, Value** out);                                    // 49
    Slot slots_50[1];
    Status* (*tensor_data)(Value*, void** out);                                                         // 51
    Slot slots_52[3];
    Status* (*as_tensor_info)(const TypeInfo*, const TensorInfo** out);                                 // 55
    Slot slots_56[4];
    Status* (*element_type)(const TensorInfo*, int* out);                                               // 60
    Status* (*rank)(const TensorInfo*, std::size_t* out);                                               // 61
    Status* (*dimensions)(const TensorInfo*, std::int64_t* out, std::size_t rank);                      // 62
    Slot slots_63[2];
    Status* (*value_info)(const Value*, TensorInfo** out);                                              // 65
    Slot slots_66[3];
    Status* (*create_cpu_memory_info)(int allocator_type, int memory_type, MemoryInfo** out);           // 69
    Slot slots_70[6];
    Status* (*allocator_free)(Allocator*, void*);                                                       // 76
    Slot slots_77[1];
    Status* (*default_allocator)(Allocator** out);                                                      // 78
    Slot slots_79[13];
    void (*release_env)(Env*);                                                                          // 92
    void (*release_status)(Status*);                                                                    // 93
    void (*release_memory_info)(MemoryInfo*);                                                           // 94
    void (*release_session)(Session*);                                                                  // 95
    void (*release_value)(Value*);                                                                      // 96
    Slot slots_97[1];
    void (*release_type_info)(TypeInfo*);                                                               // 98
    void (*release_tensor_info)(TensorInfo*);                                                           // 99
    void (*release_session_options)(SessionOptions*);                                                   // 100
    Slot slots_101[9];
    Status* (*end_profiling)(Session*, Allocator*, char** out);                                         // 110
    Slot slots_111[19];
    Status* (*add_session_config)(SessionOptions*, const char* key, const char* value);                 // 130
};

struct ApiBase {
    const Api* (*get_api)(std::uint32_t version);
    const char* (*version)();
};

using GetApiBase = const ApiBase* (*)();

#define BOA_EDGE_AT_SLOT(member, slot) \
    static_assert(offsetof(Api, member) == (slot) * sizeof(void*), #member " must stand at slot " #slot)
BOA_EDGE_AT_SLOT(error_message, 2);
BOA_EDGE_AT_SLOT(create_env, 3);
BOA_EDGE_AT_SLOT(disable_telemetry, 6);
BOA_EDGE_AT_SLOT(create_session, 7);
BOA_EDGE_AT_SLOT(run, 9);
BOA_EDGE_AT_SLOT(create_session_options, 10);
BOA_EDGE_AT_SLOT(enable_profiling, 14);
BOA_EDGE_AT_SLOT(set_optimization_level, 23);
BOA_EDGE_AT_SLOT(set_intra_op_threads, 24);
BOA_EDGE_AT_SLOT(set_inter_op_threads, 25);
BOA_EDGE_AT_SLOT(input_count, 30);
BOA_EDGE_AT_SLOT(output_count, 31);
BOA_EDGE_AT_SLOT(input_type, 33);
BOA_EDGE_AT_SLOT(output_type, 34);
BOA_EDGE_AT_SLOT(input_name, 36);
BOA_EDGE_AT_SLOT(output_name, 37);
BOA_EDGE_AT_SLOT(create_tensor, 48);
BOA_EDGE_AT_SLOT(wrap_tensor, 49);
BOA_EDGE_AT_SLOT(tensor_data, 51);
BOA_EDGE_AT_SLOT(as_tensor_info, 55);
BOA_EDGE_AT_SLOT(element_type, 60);
BOA_EDGE_AT_SLOT(rank, 61);
BOA_EDGE_AT_SLOT(dimensions, 62);
BOA_EDGE_AT_SLOT(value_info, 65);
BOA_EDGE_AT_SLOT(create_cpu_memory_info, 69);
BOA_EDGE_AT_SLOT(allocator_free, 76);
BOA_EDGE_AT_SLOT(default_allocator, 78);
BOA_EDGE_AT_SLOT(release_env, 92);
BOA_EDGE_AT_SLOT(release_status, 93);
BOA_EDGE_AT_SLOT(release_memory_info, 94);
BOA_EDGE_AT_SLOT(release_session, 95);
BOA_EDGE_AT_SLOT(release_value, 96);
BOA_EDGE_AT_SLOT(release_type_info, 98);
BOA_EDGE_AT_SLOT(release_tensor_info, 99);
BOA_EDGE_AT_SLOT(release_session_options, 100);
BOA_EDGE_AT_SLOT(end_profiling, 110);
BOA_EDGE_AT_SLOT(add_session_config, 130);
#undef BOA_EDGE_AT_SLOT

}  // namespace ort
