//! NVIDIA GPUs through the CUDA driver and NVRTC, both found at run time.
//!
//! The portable kernels are those of `shaders/`, translated ([`mod@translate`]); kernels of this backend's own are
//! `.cu` files beside them. Recording launches on the encoder's stream, which may be the caller's and may be
//! capturing a graph; it waits for nothing and allocates nothing.

mod compile;
mod device;
pub mod translate;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arrayvec::ArrayVec;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::kernels::{Boxes, MAX_BINDINGS, MAX_BOXES, Operation};
use crate::plan::{Backend, BufferSlice, Launch};
use crate::schedule::{DeviceFacts, Units};

pub use compile::Compiler;
use device::{Blocks, BoxMap, Device, Function, Memory, Stream};
use translate::{Translated, translate, translate_around};

/// A CUDA device. Clones share it and its compiled kernels.
#[derive(Debug, Clone)]
pub struct Cuda {
    device: Arc<Device>,
    compiler: Compiler,
    stream: Arc<Stream>,
    /// Kernels by all that they are made of.
    kernels: Arc<Mutex<HashMap<String, CudaKernel>>>,
    max_binding_bytes: u64,
}

/// Device memory: this backend's, or a caller's.
#[derive(Debug, Clone)]
pub struct CudaBuffer {
    address: CUdeviceptr,
    bytes: u64,
    /// Keeps this backend's own memory.
    _memory: Option<Arc<Memory>>,
}

impl CudaBuffer {
    /// A caller's memory.
    ///
    /// # Safety
    /// `address` is device memory of the plan's device, of at least `bytes` bytes, aligned to 16 of them, and lives
    /// until all that was recorded with it has run.
    #[allow(unsafe_code, reason = "a caller's memory")]
    pub unsafe fn from_raw(address: u64, bytes: u64) -> Self {
        Self { address, bytes, _memory: None }
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }
}

/// A compiled kernel.
#[derive(Debug, Clone)]
pub struct CudaKernel {
    function: Arc<Function>,
    threads: [u32; 3],
    shared_bytes: u32,
    uniform: Option<usize>,
    sized: Arc<[usize]>,
    may_be_early: bool,
    /// Which bindings it writes.
    written: ArrayVec<bool, MAX_BINDINGS>,
    /// From which bindings, by number, it has boxes copied.
    boxes: ArrayVec<(usize, Boxes), MAX_BOXES>,
}

/// A kernel's arguments but for the place in its uniform buffer.
#[derive(Debug)]
pub struct CudaBinding {
    /// Addresses by binding, then sizes.
    arguments: ArrayVec<u64, { 2 * MAX_BINDINGS }>,
    /// Its last arguments.
    maps: ArrayVec<BoxMap, MAX_BOXES>,
    /// First byte, byte behind the last, and whether it is written.
    ranges: ArrayVec<(u64, u64, bool), MAX_BINDINGS>,
    /// What has to live as long.
    _buffers: ArrayVec<CudaBuffer, MAX_BINDINGS>,
}

impl CudaBinding {
    /// Whether neither writes what the other reads or writes.
    fn is_independent_of(&self, other: &Self) -> bool {
        let apart = |a: &(u64, u64, bool), b: &(u64, u64, bool)| a.1 <= b.0 || b.1 <= a.0 || !(a.2 || b.2);
        self.ranges.iter().all(|a| other.ranges.iter().all(|b| apart(a, b)))
    }
}

/// A stream on which kernels are launched as they are recorded.
#[derive(Debug, Clone)]
pub struct CudaEncoder {
    stream: CUstream,
    _own: Option<Arc<Stream>>,
}

impl CudaEncoder {
    /// A caller's stream, which may be capturing a graph.
    ///
    /// # Safety
    /// `stream` is a stream of the plan's device and lives as long as this encoder.
    #[allow(unsafe_code, reason = "a caller's stream")]
    pub unsafe fn from_raw(stream: CUstream) -> Self {
        Self { stream, _own: None }
    }
}

impl Cuda {
    /// How many devices there are.
    ///
    /// # Errors
    /// There is no driver.
    pub fn count() -> Result<usize> {
        Device::count()
    }

    /// Opens a device by its number.
    ///
    /// # Errors
    /// No driver, no such device, one older than compute capability 8.0, or no NVRTC.
    pub fn open(ordinal: usize) -> Result<Self> {
        let device = Arc::new(Device::open(ordinal)?);
        let (major, minor) = device.capability();
        if major < 8 {
            return Err(Error::Device {
                backend: "cuda",
                operation: format!("opening device {ordinal}"),
                reason: format!(
                    "found compute capability {major}.{minor} ({}), expected 8.0 or newer; use the backend wgpu",
                    device.name()
                ),
            });
        }
        // The architecture's own instructions exist under the suffix from 9.0 on.
        let own = if major >= 9 { "a" } else { "" };
        let compiler = Compiler::new(&format!("sm_{major}{minor}{own}"))?;
        let stream = Arc::new(Stream::new(&device)?);
        // Kernels index words with 32 bits.
        Ok(Self { device, compiler, stream, kernels: Arc::default(), max_binding_bytes: (1 << 34) - 16 })
    }

    /// The same device with smaller buffers for weights.
    #[must_use]
    pub fn with_binding_limit(&self, bytes: u64) -> Self {
        Self { max_binding_bytes: self.max_binding_bytes.min(bytes), ..self.clone() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Compiles with this compiler from now on: another cache.
    #[must_use]
    pub fn with_compiler(&self, compiler: Compiler) -> Self {
        Self { compiler, kernels: Arc::default(), ..self.clone() }
    }

    /// The compiler.
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// A kernel of WGSL, translated and compiled; `label` names it in errors. Its arguments are its bindings.
    ///
    /// # Errors
    /// What the translator lacks, or what NVRTC says.
    pub fn kernel(&self, label: &str, wgsl: &str) -> Result<CudaKernel> {
        self.cached(label, wgsl, || translate(wgsl))
    }

    /// The kernel that a key stands for, compiled once.
    fn cached(&self, label: &str, key: &str, translate: impl Fn() -> Result<Translated, String>) -> Result<CudaKernel> {
        let known = self.kernels.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned();
        if let Some(kernel) = known {
            return Ok(kernel);
        }
        let Translated { text, threads, shared_bytes, uniform, sized, written, may_be_early } = translate()
            .map_err(|reason| Error::Device { backend: "cuda", operation: format!("translating {label}"), reason })?;
        let function =
            self.compiler.compile(label, &text, |code| self.device.load(code, translate::ENTRY, shared_bytes))?;
        let kernel = CudaKernel {
            function: Arc::new(function),
            threads,
            shared_bytes,
            uniform,
            sized: sized.into(),
            may_be_early,
            written: written.iter().copied().collect(),
            boxes: ArrayVec::new(),
        };
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(kernels.entry(key.into()).or_insert(kernel).clone())
    }

    /// An encoder on this backend's own stream.
    pub fn encoder(&self) -> CudaEncoder {
        CudaEncoder { stream: self.stream.handle(), _own: Some(Arc::clone(&self.stream)) }
    }

    /// An encoder on a stream of its own, behind all that was recorded on this backend's: other threads may wait for that
    /// one, which a stream that captures does not allow.
    fn capturing(&self) -> Result<CudaEncoder> {
        self.device.wait(self.stream.handle())?;
        let stream = Arc::new(Stream::new(&self.device)?);
        Ok(CudaEncoder { stream: stream.handle(), _own: Some(stream) })
    }

    /// Waits for all that was recorded.
    ///
    /// # Errors
    /// The device fails, now or in what was recorded.
    pub fn wait(&self, encoder: &CudaEncoder) -> Result<()> {
        self.device.wait(encoder.stream)
    }

    /// The words of a buffer, behind all that was recorded on this backend's own stream.
    ///
    /// # Errors
    /// The device fails.
    pub fn read_words(&self, buffer: &CudaBuffer) -> Result<Vec<u32>> {
        self.device.read(&self.stream, buffer.address, buffer.bytes as usize / 4)
    }

    /// Seconds on the device of each of `count` recordings: a graph with marks between them.
    ///
    /// # Errors
    /// The device fails, or `record` does.
    pub fn seconds(
        &self,
        count: usize,
        record: &mut dyn FnMut(&mut CudaEncoder, usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let mut encoder = self.capturing()?;
        let (stream, mut marks) = (encoder.stream, Vec::with_capacity(count + 1));
        let graph = self.device.capture(stream, || {
            marks.push(self.device.event(stream)?);
            for at in 0..count {
                record(&mut encoder, at)?;
                marks.push(self.device.event(stream)?);
            }
            Ok(())
        })?;
        self.device.replay(stream, &graph)?;
        self.device.wait(stream)?;
        marks.windows(2).map(|pair| self.device.seconds(&pair[0], &pair[1])).collect()
    }

    /// Seconds on the device that `count` recordings, captured as one graph, take in the mean, for each of `replays`.
    ///
    /// # Errors
    /// The device fails, or `record` does.
    pub fn replayed(
        &self,
        count: usize,
        replays: usize,
        record: &mut dyn FnMut(&mut CudaEncoder, usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let mut encoder = self.capturing()?;
        let stream = encoder.stream;
        let graph = self.device.capture(stream, || (0..count).try_for_each(|at| record(&mut encoder, at)))?;
        let one = |_| {
            let start = self.device.event(stream)?;
            self.device.replay(stream, &graph)?;
            let end = self.device.event(stream)?;
            self.device.wait(stream)?;
            Ok(self.device.seconds(&start, &end)? / count.max(1) as f64)
        };
        (0..replays).map(one).collect()
    }
}

impl Backend for Cuda {
    type Buffer = CudaBuffer;
    type Kernel = CudaKernel;
    type Binding = CudaBinding;
    type Encoder = CudaEncoder;

    fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            backend: "cuda",
            max_binding_bytes: self.max_binding_bytes,
            max_workgroups: 65_535,
            // `cvt.f32.f16` is exact; tests ask it for all codes.
            exact_halves: true,
            matrix_units: match self.device.capability() {
                // Later architectures lack these instructions.
                (9, _) => Units::Warpgroups { multiprocessors: self.device.multiprocessors() },
                _ => Units::Warps,
            },
        }
    }

    fn create_buffer(&self, name: &str, bytes: u64, _uniform: bool) -> Result<CudaBuffer> {
        let memory = self.device.allocate(&self.stream, name, bytes)?;
        Ok(CudaBuffer { address: memory.address(), bytes, _memory: Some(Arc::new(memory)) })
    }

    fn buffer_bytes(&self, buffer: &CudaBuffer) -> u64 {
        buffer.bytes
    }

    fn same_buffer(&self, a: &CudaBuffer, b: &CudaBuffer) -> bool {
        a.address < b.address + b.bytes && b.address < a.address + a.bytes
    }

    fn write(&self, buffer: &CudaBuffer, offset: u64, words: &[u32]) -> Result<()> {
        let (bytes, room) = (4 * words.len() as u64, buffer.bytes);
        if offset.checked_add(bytes).is_none_or(|end| end > room) {
            return Err(Error::invalid(
                "words",
                format!("{bytes} bytes at {offset}"),
                format!("at most {room} bytes"),
                "write inside the buffer",
            ));
        }
        self.device.write(&self.stream, buffer.address + offset, words)
    }

    fn compile(&self, name: &str, operation: &Operation) -> Result<CudaKernel> {
        let source = operation.source();
        let (label, wgsl) = (format!("{} for {name}", source.kernel()), source.wgsl());
        match source.cuda() {
            None => self.kernel(&label, &wgsl),
            Some(text) => {
                // Of WGSL the text says all; here the kernel stands apart.
                let key = format!("{wgsl}// {}\n", source.kernel());
                let kernel = self.cached(&label, &key, || translate_around(&wgsl, &text))?;
                let number = |boxes: Boxes| {
                    let found = source.bindings.iter().position(|binding| binding.name == boxes.buffer);
                    found.map(|number| (number, boxes))
                };
                Ok(CudaKernel { boxes: operation.boxes().into_iter().filter_map(number).collect(), ..kernel })
            }
        }
    }

    fn compile_all(&self, operations: &[(&str, &Operation)]) -> Result<Vec<CudaKernel>> {
        // NVRTC compiles on as many threads as call it; the first refusal in order is the answer.
        let kernels: Vec<_> = operations.par_iter().map(|(name, operation)| self.compile(name, operation)).collect();
        kernels.into_iter().collect()
    }

    fn bind(&self, kernel: &CudaKernel, slices: &[BufferSlice<'_, Self>]) -> Result<CudaBinding> {
        for BufferSlice { buffer, offset, bytes } in slices {
            let aligned = (buffer.address + offset).is_multiple_of(16);
            if !aligned || offset.checked_add(*bytes).is_none_or(|end| end > buffer.bytes) {
                return Err(Error::invalid(
                    "buffer",
                    format!("{bytes} bytes at byte {offset} of {} at {:#x}", buffer.bytes, buffer.address),
                    "a part of the buffer that begins at a multiple of 16 bytes",
                    "give a larger buffer, or one that is aligned to 16 bytes",
                ));
            }
        }
        let addresses = slices.iter().map(|slice| slice.buffer.address + slice.offset);
        let sizes = kernel.sized.iter().filter_map(|&number| slices.get(number)).map(|slice| slice.bytes);
        let ranges = slices.iter().zip(&kernel.written).map(|(slice, &written)| {
            let first = slice.buffer.address + slice.offset;
            (first, first + slice.bytes, written)
        });
        let map = |(number, boxes): &(usize, Boxes)| {
            let slice = slices.get(*number)?;
            Some(self.device.box_map(slice.buffer.address + slice.offset, slice.bytes, boxes))
        };
        Ok(CudaBinding {
            arguments: addresses.chain(sizes).collect(),
            maps: kernel.boxes.iter().filter_map(map).collect::<Result<_>>()?,
            ranges: ranges.collect(),
            _buffers: slices.iter().map(|slice| slice.buffer.clone()).collect(),
        })
    }

    fn copy_word(&self, encoder: &mut CudaEncoder, from: (&CudaBuffer, u64), to: &CudaBuffer) {
        self.device.copy_word(encoder.stream, from.0.address + from.1, to.address);
    }

    fn launch(&self, encoder: &mut CudaEncoder, launches: &mut dyn Iterator<Item = Launch<'_, Self>>) -> Result<()> {
        self.device.enter()?;
        // The launch before, if that has waited for all before it.
        let mut before: Option<&CudaBinding> = None;
        for Launch { kernel, binding, workgroups, params } in launches {
            if workgroups.contains(&0) {
                continue;
            }
            let early = kernel.may_be_early && before.is_some_and(|before| binding.is_independent_of(before));
            before = (!early).then_some(binding);
            let mut arguments = binding.arguments.clone();
            if let Some(argument) = kernel.uniform.and_then(|number| arguments.get_mut(number)) {
                *argument += u64::from(params);
            }
            if kernel.may_be_early {
                arguments.push(u64::from(early));
            }
            let blocks = Blocks { count: workgroups, threads: kernel.threads, shared_bytes: kernel.shared_bytes };
            self.device.launch(encoder.stream, &kernel.function, blocks, &mut arguments, &binding.maps)?;
        }
        Ok(())
    }
}
