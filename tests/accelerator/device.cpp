// A stand-in accelerator: a torch device in host memory that counts bytes, copies and waits.
//
// Its tensors are of the device type PrivateUse1 and never mix with those of the CPU, so what a GPU refuses (two devices
// in one operator, a generator of another device, a NumPy view) is refused here as well. Operators run by the CPU's
// kernels on aliases of the device's memory. What decides how much memory a GPU needs follows CUDA: the lists of
// autocast here; attention without the matrix of scores, and fused norms, in device.py.
//
// Not modelled: streams (all work is synchronous), workspaces of libraries, kernels' own temporary memory.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

namespace {

using at::Tensor;
constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
const c10::Device kFirst(kDevice, 0);
constexpr size_t kRound = 512;  // CUDA's allocator hands out multiples of it, and memory_allocated counts those.

struct Ledger {
  std::mutex mutex;
  std::unordered_map<void*, size_t> blocks;
  c10::CachingDeviceAllocator::DeviceStats stats;
  int64_t limit = 0;  // Bytes; 0 for none.
  std::map<std::string, int64_t> traffic;

  void count(const std::string& what, int64_t amount) {
    std::lock_guard<std::mutex> lock(mutex);
    traffic[what] += amount;
  }
};

Ledger& ledger() {
  static auto* instance = new Ledger();  // Outlives tensors that die while the process ends.
  return *instance;
}

void release(void* pointer) {
  auto& book = ledger();
  std::lock_guard<std::mutex> lock(book.mutex);
  const auto found = book.blocks.find(pointer);
  if (found == book.blocks.end()) return;
  book.stats.allocated_bytes[0].decrease(found->second);
  book.stats.reserved_bytes[0].decrease(found->second);
  book.blocks.erase(found);
  std::free(pointer);
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, kFirst};
    const size_t rounded = (bytes + kRound - 1) / kRound * kRound;
    auto& book = ledger();
    std::lock_guard<std::mutex> lock(book.mutex);
    const auto held = book.stats.allocated_bytes[0].current;
    TORCH_CHECK_WITH(
        OutOfMemoryError, !book.limit || held + static_cast<int64_t>(rounded) <= book.limit,
        "CUDA out of memory. Tried to allocate ", rounded, " bytes; ", held, " of ", book.limit, " are taken.");
    void* pointer = std::aligned_alloc(kRound, rounded);
    TORCH_CHECK(pointer, "The host ran out of memory for the stand-in device.");
    book.blocks[pointer] = rounded;
    book.stats.allocated_bytes[0].increase(rounded);
    book.stats.reserved_bytes[0].increase(rounded);
    return {pointer, pointer, &release, kFirst};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    std::lock_guard<std::mutex> lock(ledger().mutex);
    return ledger().stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    std::lock_guard<std::mutex> lock(ledger().mutex);
    ledger().stats.allocated_bytes[0].reset_peak();
    ledger().stats.reserved_bytes[0].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    std::lock_guard<std::mutex> lock(ledger().mutex);
    const size_t total = ledger().limit ? ledger().limit : size_t{1} << 40;
    return {total - ledger().stats.allocated_bytes[0].current, total};
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

// ---------------------------------------------------------------------------------------- one device, one stream

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kFirst; }
  c10::Device getDevice() const override { return kFirst; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kFirst); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Draws by the CPU's generator, so that a seed makes the same numbers here and there.
struct Generator final : c10::GeneratorImpl {
  Generator() : c10::GeneratorImpl(kFirst, kKeys), inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator();
    copy->inner = inner.clone();
    return copy;
  }
  at::Generator inner;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static auto* generator = new at::Generator(getNewGenerator(index));
    return *generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  at::Device getDeviceFromPtr(void*) const override { return kFirst; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = allocator.allocate(bytes);
    if (const auto kept = std::min(bytes, storage.nbytes())) std::memcpy(fresh.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ---------------------------------------------------------------------------------- operators by the CPU's kernels

bool here(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kDevice; }

Tensor shaped_as(Tensor result, const Tensor& like) {
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return result;
}

// A tensor of the CPU on the same memory. If a kernel makes it larger, it gets memory of its own.
Tensor on_cpu(const Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), c10::Device(c10::DeviceType::CPU));
  c10::Storage same(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(c10::DeviceType::CPU), true);
  auto result = shaped_as(
      at::detail::make_tensor<c10::TensorImpl>(
          std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype()),
      tensor);
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

// The view of a tensor that a kernel made of its alias.
Tensor as_view(const Tensor& base, const Tensor& seen) {
  return shaped_as(
      at::detail::make_tensor<c10::TensorImpl>(
          c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), seen.dtype()),
      seen);
}

// What a kernel made on the host, on the device; nothing crosses for it on a GPU.
Tensor to_device(const Tensor& cpu) {
  if (!cpu.defined()) return cpu;
  auto result = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(kFirst));
  on_cpu(result).copy_(cpu);
  return result;
}

// What a kernel did to the alias of an argument that it writes to, beyond writing into its memory.
void take_over(const Tensor& original, const Tensor& seen) {
  auto* impl = original.unsafeGetTensorImpl();
  if (seen.storage().data() != original.storage().data()) {
    const auto bytes = seen.storage().nbytes();
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true);
    if (bytes) std::memcpy(storage.mutable_data(), seen.storage().data(), bytes);
    impl->set_storage_keep_dtype(std::move(storage));
  }
  if (seen.sizes() != original.sizes() || seen.strides() != original.strides())
    impl->set_sizes_and_strides(seen.sizes(), seen.strides(), seen.storage_offset());
}

// CUDA's kernels take tensors of the CPU that are single numbers, and indices.
void check_place(const std::string& name, const Tensor& tensor) {
  TORCH_CHECK(
      !tensor.defined() || here(tensor) || tensor.dim() == 0 || name.find("aten::index") == 0 ||
          name.find("aten::_index_put") == 0,
      "Expected all tensors to be on the same device, but found at least two devices, ", kFirst, " and ",
      tensor.device(), " (in ", name, ", a tensor of shape ", tensor.sizes(), ")");
}

// Operators whose result the host must read before it can go on.
const std::set<std::string> kReads = {
    "aten::_local_scalar_dense", "aten::equal", "aten::masked_select", "aten::nonzero", "aten::repeat_interleave",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"};

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& formal = schema.arguments();
  const auto begin = stack->size() - formal.size();
  if (kReads.count(schema.name())) ledger().count("waits", 1);
  std::vector<std::pair<Tensor, Tensor>> seen;  // Originals and their aliases.
  std::vector<Tensor> written;                  // Originals that the operator writes to and returns, in order.

  auto swap = [&](const Tensor& tensor, bool writes) {
    check_place(schema.name(), tensor);
    if (writes) written.push_back(tensor);
    if (!here(tensor)) return tensor;
    seen.emplace_back(tensor, on_cpu(tensor));
    return seen.back().second;
  };
  for (const auto number : c10::irange(formal.size())) {
    auto& value = (*stack)[begin + number];
    const bool writes = formal[number].alias_info() && formal[number].alias_info()->isWrite();
    if (value.isTensor()) {
      value = swap(value.toTensor(), writes);
    } else if (value.isTensorList()) {
      c10::List<Tensor> swapped;
      for (const Tensor& tensor : value.toTensorVector()) swapped.push_back(swap(tensor, writes));
      value = std::move(swapped);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> swapped;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        swapped.push_back(tensor ? std::optional<Tensor>(swap(*tensor, writes)) : std::nullopt);
      value = std::move(swapped);
    } else if (value.isDevice()) {
      value = c10::Device(c10::DeviceType::CPU);
    } else if (value.isGenerator()) {
      const auto generator = value.toGenerator();
      TORCH_CHECK(
          generator.device().type() == kDevice, "Expected a generator of device ", kFirst, ", not of ",
          generator.device());
      value = static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
    }
  }

  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (const auto& [original, alias] : seen)
    if (std::any_of(written.begin(), written.end(), [&, &o = original](auto& w) { return w.is_same(o); }))
      take_over(original, alias);
  const auto& returns = schema.returns();
  const auto first = stack->size() - returns.size();
  size_t next_written = 0;
  for (const auto number : c10::irange(returns.size())) {
    auto& value = (*stack)[first + number];
    const auto* mark = returns[number].alias_info();
    if (value.isTensor() && mark && mark->isWrite()) {
      value = written.at(next_written++);
    } else if (value.isTensor() && mark) {
      value = as_view(seen.front().first, value.toTensor());
    } else if (value.isTensor()) {
      // Kernels such as that of `contiguous` may return their input as it is.
      const auto same =
          std::find_if(seen.begin(), seen.end(), [&](auto& pair) { return pair.second.is_same(value.toTensor()); });
      value = same == seen.end() ? to_device(value.toTensor()) : same->first;
    } else if (value.isTensorList() && !mark) {
      c10::List<Tensor> moved;
      for (const Tensor& tensor : value.toTensorVector()) moved.push_back(to_device(tensor));
      value = std::move(moved);
    }
  }
}

// ------------------------------------------------------------------------------------- kernels of the device's own

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator, kKeys, c10::dtype_or_default(dtype));
}

// A copy to the host is waited for unless it need not be.
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (here(from) != here(to)) {
    ledger().count(here(to) ? "to_device" : "to_host", to.nbytes());
    if (here(from) && !non_blocking) ledger().count("waits", 1);
  }
  auto target = here(to) ? on_cpu(to) : to;
  target.copy_(here(from) ? on_cpu(from) : from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto seen = on_cpu(self);
  seen.resize_(C10_AS_INTARRAYREF_SLOW(size), format);
  take_over(self, seen);
  return self;
}

Tensor& set_storage(
    Tensor& self, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_whole_storage(Tensor& self, c10::Storage storage) {
  const c10::SymInt length(static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize())), one(1);
  return set_storage(self, std::move(storage), 0, c10::SymIntArrayRef(length), c10::SymIntArrayRef(one));
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

void record_stream(Tensor&, c10::Stream) {}

// `parameter.data = tensor` may change the device, as it may between CPU and CUDA.
bool compatible(const Tensor& self, const Tensor& from) {
  auto plain = [](const Tensor& tensor) { return here(tensor) || tensor.is_cpu(); };
  return plain(self) && plain(from) && self.layout() == c10::kStrided && from.layout() == c10::kStrided;
}

int64_t choose_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  return static_cast<int64_t>(at::SDPBackend::overrideable);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);
  // Operators with kernels on CPU and GPU that other devices would put together of smaller ones.
  for (const char* name :
       {"native_layer_norm", "native_group_norm", "native_group_norm_backward", "embedding", "silu_backward",
        "_weight_norm_interface", "linalg_vector_norm"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&by_cpu>());
}

// Here and not above, where tensor subclasses of libraries would be asked: for other devices torch answers by itself.
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { m.impl("_has_compatible_shallow_copy_type", &compatible); }

// Lazy conjugation is resolved by copying, so the copy has to take conjugated tensors itself.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// ------------------------------------------------------------------------------------------ autocast by CUDA's lists

at::ScalarType lower() { return at::autocast::get_autocast_dtype(kDevice); }

template <bool to_float>
void cast_arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastPrivateUse1);
  const auto dtype = to_float ? at::kFloat : lower();
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    auto& slot = const_cast<c10::IValue&>(value);
    if (value.isTensor() && value.toTensor().defined()) {
      slot = at::autocast::cached_cast(dtype, value.toTensor(), kDevice);
    } else if (value.isTensorList()) {
      slot = c10::List<Tensor>(at::autocast::cached_cast(dtype, at::ITensorListRef(value.toTensorVector()), kDevice));
    }
  }
  op.callBoxed(stack);
}

// With a dtype asked for, sums are left alone; otherwise they are made in float32.
void sum_in_float(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastPrivateUse1);
  const auto& formal = op.schema().arguments();
  const auto begin = stack->size() - formal.size();
  const auto& first = (*stack)[begin].toTensor();
  for (const auto number : c10::irange(formal.size())) {
    auto& value = (*stack)[begin + number];
    if (formal[number].name() == "dtype" && value.isNone() && at::autocast::is_eligible(first, kDevice))
      value = at::kFloat;
  }
  op.callBoxed(stack);
}

void promote(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastPrivateUse1);
  const auto size = op.schema().arguments().size();
  auto widest = lower();
  auto look = [&](const Tensor& tensor) {
    if (here(tensor)) widest = at::autocast::prioritize(widest, tensor, kDevice);
  };
  for (const auto& value : torch::jit::last(*stack, size)) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) look(tensor);
  }
  widest == at::kFloat ? cast_arguments<true>(op, stack) : cast_arguments<false>(op, stack);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

#define NAME_OF(_1, _2, name, ...) name
#define NAME_1(op) #op
#define NAME_2(op, overload) #op "." #overload
#define IMPL(kernel, ...) \
  m.impl(NAME_OF(__VA_ARGS__, NAME_2, NAME_1)(__VA_ARGS__), torch::CppFunction::makeFromBoxedFunction<&kernel>());
#define LOWER(...) IMPL(cast_arguments<false>, __VA_ARGS__)
#define FLOAT(...) IMPL(cast_arguments<true>, __VA_ARGS__)
#define SUM(...) IMPL(sum_in_float, __VA_ARGS__)
#define PROMOTE(...) IMPL(promote, __VA_ARGS__)

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(SUM)
  AT_FORALL_PROMOTE(PROMOTE)
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}  // namespace at::native

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("alias", &on_cpu, "A tensor of the CPU on the memory of a device's.");
  m.def("adopt", &to_device, "A tensor of the device with the values of a CPU's, as if it had been computed there.");
  m.def("set_limit", [](int64_t bytes) { ledger().limit = bytes; }, "Bytes of the device; 0 for no limit.");
  m.def("traffic", [] {
    std::lock_guard<std::mutex> lock(ledger().mutex);
    return ledger().traffic;
  }, "Bytes that crossed, by direction, and how often the host waited for the device.");
}
