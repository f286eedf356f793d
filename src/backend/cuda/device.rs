//! The driver's calls, each with the proof that it is sound.

use std::ffi::c_void;
use std::sync::Arc;

use arrayvec::ArrayVec;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdeviceptr, CUresult, CUstream};
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;

use crate::error::{Error, Result};
use crate::kernels::{Boxes, MAX_BINDINGS, MAX_BOXES};

/// A device with its primary context.
#[derive(Debug)]
pub(super) struct Device {
    context: Arc<CudaContext>,
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
}

/// Memory of a device, freed when it goes.
#[derive(Debug)]
pub(super) struct Memory {
    context: Arc<CudaContext>,
    address: CUdeviceptr,
}

/// A stream, destroyed when it goes. It does not wait for the default stream, nor that for it.
#[derive(Debug)]
pub(super) struct Stream {
    context: Arc<CudaContext>,
    handle: CUstream,
}

/// How the device finds boxes of a buffer; its bytes are an argument of a kernel.
pub(super) type BoxMap = sys::CUtensorMap;

/// A kernel of a loaded module.
pub(super) type Function = CudaFunction;

/// Blocks of a launch.
pub(super) struct Blocks {
    /// How many.
    pub count: [u32; 3],
    /// Threads of each.
    pub threads: [u32; 3],
    /// Bytes that each shares beside those that its kernel declares.
    pub shared_bytes: u32,
}

/// A mark in a stream, with its time.
pub(super) struct Event {
    context: Arc<CudaContext>,
    handle: sys::CUevent,
}

/// `CU_EVENT_RECORD_EXTERNAL`: an event that a graph records may be asked for its time.
const EXTERNAL: u32 = 1;

/// Launches that were captured, destroyed when it goes.
pub(super) struct Graph {
    context: Arc<CudaContext>,
    handle: sys::CUgraphExec,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs, and each call here makes
// it so.
#[allow(unsafe_code, reason = "handles of the driver")]
unsafe impl Send for Stream {}
// SAFETY: as above; the driver orders calls on a stream itself.
#[allow(unsafe_code, reason = "handles of the driver")]
unsafe impl Sync for Stream {}

fn failed(operation: impl FnOnce() -> String, error: DriverError) -> Error {
    let operation = operation();
    let reason = error.to_string();
    match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { backend: "cuda", operation, reason },
        // The context is of no use after these.
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_ASSERT
        | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUresult::CUDA_ERROR_INVALID_PC
        | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
        | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED => Error::DeviceLost { backend: "cuda", operation },
        _ => Error::Device { backend: "cuda", operation, reason },
    }
}

impl Device {
    #[allow(unsafe_code, reason = "loading the driver")]
    fn probe() -> Result<()> {
        // SAFETY: loads the library and calls nothing in it.
        if unsafe { sys::is_culib_present() } {
            return result::init().map_err(|error| failed(|| "starting the driver".into(), error));
        }
        Err(Error::Device {
            backend: "cuda",
            operation: "loading the driver".into(),
            reason:
                "found no libcuda.so or libcuda.so.1 (on Windows nvcuda.dll) where the system looks for libraries, \
                     expected NVIDIA's driver; install it, or use the backend wgpu"
                    .into(),
        })
    }

    pub(super) fn count() -> Result<usize> {
        Self::probe()?;
        let count = result::device::get_count().map_err(|error| failed(|| "counting devices".into(), error))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(Error::invalid(
                "device",
                ordinal,
                format!("below the number of devices, {count}"),
                "name a device that is here, or let CUDA_VISIBLE_DEVICES show more",
            ));
        }
        let failed = |error| failed(|| format!("opening device {ordinal}"), error);
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let name = context.name().map_err(failed)?;
        let capability = context.compute_capability().map_err(failed)?;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).map_err(failed)?;
        Ok(Self { context, name, capability, multiprocessors: usize::try_from(multiprocessors).unwrap_or(1) })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub(super) fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Makes the context this thread's.
    pub(super) fn enter(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| failed(|| "entering the device's context".into(), error))
    }

    /// Zeroed memory.
    #[allow(unsafe_code, reason = "the driver's memory")]
    pub(super) fn allocate(&self, stream: &Stream, name: &str, bytes: u64) -> Result<Memory> {
        self.enter()?;
        let operation = || format!("creating buffer {name} of {bytes} bytes");
        let size = usize::try_from(bytes.max(4)).unwrap_or(usize::MAX);
        // SAFETY: the context is current; the address is owned by what is returned.
        let address = unsafe { result::malloc_sync(size) }.map_err(|error| failed(operation, error))?;
        let memory = Memory { context: Arc::clone(&self.context), address };
        // SAFETY: the memory has so many bytes and nothing else knows it yet.
        unsafe { result::memset_d8_async(address, 0, size, stream.handle) }
            .map_err(|error| failed(operation, error))?;
        self.wait(stream.handle)?;
        Ok(memory)
    }

    /// Copies words to the device and waits for that. The caller has checked that they fit.
    #[allow(unsafe_code, reason = "a copy of the driver's")]
    pub(super) fn write(&self, stream: &Stream, address: CUdeviceptr, words: &[u32]) -> Result<()> {
        if words.is_empty() {
            return Ok(());
        }
        self.enter()?;
        let operation = || format!("writing {} bytes", 4 * words.len());
        // SAFETY: the caller has checked the bounds of the target; `words` lives until the copy has been waited for.
        unsafe { result::memcpy_htod_async(address, words, stream.handle) }
            .map_err(|error| failed(operation, error))?;
        self.wait(stream.handle)
    }

    /// Copies words from the device and waits for them. The caller has checked that they are there.
    #[allow(unsafe_code, reason = "a copy of the driver's")]
    pub(super) fn read(&self, stream: &Stream, address: CUdeviceptr, words: usize) -> Result<Vec<u32>> {
        self.enter()?;
        let mut target = vec![0; words];
        if words > 0 {
            let operation = || format!("reading {} bytes", 4 * words);
            // SAFETY: as above, with source and target exchanged.
            unsafe { result::memcpy_dtoh_async(&mut target, address, stream.handle) }
                .map_err(|error| failed(operation, error))?;
            self.wait(stream.handle)?;
        }
        Ok(target)
    }

    /// Records a copy of four bytes, which the caller has checked on both sides. A failure is the next call's.
    #[allow(unsafe_code, reason = "a copy of the driver's")]
    pub(super) fn copy_word(&self, stream: CUstream, from: CUdeviceptr, to: CUdeviceptr) {
        if self.enter().is_ok() {
            // SAFETY: both buffers live as long as what was recorded with them, and have these four bytes.
            let _ = unsafe { result::memcpy_dtod_async(to, from, 4, stream) };
        }
    }

    /// Waits for a stream.
    #[allow(unsafe_code, reason = "a stream of the driver's")]
    pub(super) fn wait(&self, stream: CUstream) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is alive: its owner called.
        unsafe { result::stream::synchronize(stream) }
            .map_err(|error| failed(|| "waiting for the device".into(), error))
    }

    /// Loads machine code and finds its entry, whose blocks share so many bytes beside those that it declares.
    pub(super) fn load(&self, code: Vec<u8>, entry: &str, shared_bytes: u32) -> Result<Function> {
        let failed = |error| failed(|| format!("loading {entry}"), error);
        let module = self.context.load_module(Ptx::from_binary(code)).map_err(failed)?;
        let function = module.load_function(entry).map_err(failed)?;
        if shared_bytes > 0 {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = i32::try_from(shared_bytes).unwrap_or(i32::MAX);
            function.set_attribute(most, bytes).map_err(failed)?;
        }
        Ok(function)
    }

    /// A map of boxes [matrix, row, byte] of a buffer; what lies outside it is copied as zeros.
    #[allow(unsafe_code, reason = "a map of the driver's")]
    pub(super) fn box_map(&self, address: CUdeviceptr, bytes: u64, boxes: &Boxes) -> Result<BoxMap> {
        let &Boxes { buffer, row_bytes, rows, matrix_bytes, box_rows } = boxes;
        let dimensions = [row_bytes, rows, bytes / matrix_bytes.max(1)];
        let strides = [row_bytes, matrix_bytes];
        let (copied, steps) = ([128, box_rows, 1], [1; 3]);
        let mut map = BoxMap { opaque: [0; 16] };
        // SAFETY: every pointer is to an array of this frame as long as the rank says; the address is not followed.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                3,
                address as *mut c_void,
                dimensions.as_ptr(),
                strides.as_ptr(),
                copied.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|error| failed(|| format!("mapping boxes of {buffer}, {boxes:?} of {bytes} bytes"), error))?;
        Ok(map)
    }

    /// Launches a kernel. Its context is current.
    #[allow(unsafe_code, reason = "a launch of the driver's")]
    pub(super) fn launch(
        &self,
        stream: CUstream,
        function: &Function,
        blocks: Blocks,
        arguments: &mut [u64],
        maps: &[BoxMap],
    ) -> Result<()> {
        let mut pointers: ArrayVec<*mut c_void, { 2 * MAX_BINDINGS + MAX_BOXES }> =
            arguments.iter_mut().map(|argument| std::ptr::from_mut(argument).cast()).collect();
        pointers.extend(maps.iter().map(|map| std::ptr::from_ref(map).cast_mut().cast()));
        let mut attributes: ArrayVec<sys::CUlaunchAttribute, 1> = ArrayVec::new();
        if self.capability.0 >= 9 {
            attributes.push(sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            });
        }
        let Blocks { count, threads, shared_bytes } = blocks;
        let config = sys::CUlaunchConfig {
            gridDimX: count[0],
            gridDimY: count[1],
            gridDimZ: count[2],
            blockDimX: threads[0],
            blockDimY: threads[1],
            blockDimZ: threads[2],
            sharedMemBytes: shared_bytes,
            hStream: stream,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the kernel has an argument of 8 bytes for each binding and each size, in this order, then one for each map,
        // of which boxes are copied from inside the buffer alone; and `bind` checked
        // that each binding has the bytes that the schedule says; kernels stay inside those (see `Wgpu::module`). They
        // wait for the kernel before them before they touch memory. The buffers live as long as the binding, which the
        // caller keeps until it has run; configuration and arguments are read before the call returns.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(|error| failed(|| "launching a kernel".into(), error))
    }

    /// Marks a place in a stream, also in one that captures a graph: then each launch of that marks it anew.
    #[allow(unsafe_code, reason = "an event of the driver's")]
    pub(super) fn event(&self, stream: CUstream) -> Result<Event> {
        self.enter()?;
        let failed = |error| failed(|| "recording an event".into(), error);
        let handle = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed)?;
        let event = Event { context: Arc::clone(&self.context), handle };
        // SAFETY: the stream is alive: its owner called.
        let status = unsafe { result::stream::is_capturing(stream) }.map_err(failed)?;
        let flags = match status {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE => EXTERNAL,
            _ => 0,
        };
        // SAFETY: event and stream are alive and of this context.
        unsafe { sys::cuEventRecordWithFlags(event.handle, stream, flags) }.result().map_err(failed)?;
        Ok(event)
    }

    /// What `record` launches on `stream`, as a graph.
    #[allow(unsafe_code, reason = "a graph of the driver's")]
    pub(super) fn capture(&self, stream: CUstream, record: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.enter()?;
        let failed = |error| failed(|| "capturing a graph".into(), error);
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive, and its capture is ended below whatever `record` answers.
        unsafe { result::stream::begin_capture(stream, mode) }.map_err(failed)?;
        let recorded = record();
        // SAFETY: as above.
        let graph = unsafe { result::stream::end_capture(stream) };
        recorded?;
        let graph = graph.map_err(failed)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the graph is the one that was just captured; the place for the other is of this frame.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut handle, graph, 0) }.result();
        // SAFETY: what can be launched does not need the graph that it was made of, which is destroyed once.
        let _ = unsafe { result::graph::destroy(graph) };
        made.map_err(failed)?;
        Ok(Graph { context: Arc::clone(&self.context), handle })
    }

    /// Launches a graph.
    #[allow(unsafe_code, reason = "a graph of the driver's")]
    pub(super) fn replay(&self, stream: CUstream, graph: &Graph) -> Result<()> {
        self.enter()?;
        // SAFETY: both are alive and of this context; what the graph reads lives as long as its caller says.
        unsafe { result::graph::launch(graph.handle, stream) }
            .map_err(|error| failed(|| "launching a graph".into(), error))
    }

    /// Seconds between two marks that have been reached.
    #[allow(unsafe_code, reason = "an event of the driver's")]
    pub(super) fn seconds(&self, start: &Event, end: &Event) -> Result<f64> {
        self.enter()?;
        // SAFETY: both are alive and were recorded.
        let milliseconds = unsafe { result::event::elapsed(start.handle, end.handle) };
        milliseconds
            .map(|milliseconds| f64::from(milliseconds) / 1e3)
            .map_err(|error| failed(|| "reading a time".into(), error))
    }
}

impl Memory {
    pub(super) fn address(&self) -> CUdeviceptr {
        self.address
    }
}

impl Drop for Memory {
    #[allow(unsafe_code, reason = "the driver's memory")]
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by this context and freed once. The driver waits for the work that uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

impl Stream {
    pub(super) fn new(device: &Device) -> Result<Self> {
        device.enter()?;
        let handle = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| failed(|| "creating a stream".into(), error))?;
        Ok(Self { context: Arc::clone(&device.context), handle })
    }

    pub(super) fn handle(&self) -> CUstream {
        self.handle
    }
}

impl Drop for Stream {
    #[allow(unsafe_code, reason = "a stream of the driver's")]
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: created by this context and destroyed once; the driver lets its work finish.
            let _ = unsafe { result::stream::destroy(self.handle) };
        }
    }
}

impl Drop for Event {
    #[allow(unsafe_code, reason = "an event of the driver's")]
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: created by this context and destroyed once.
            let _ = unsafe { result::event::destroy(self.handle) };
        }
    }
}

impl Drop for Graph {
    #[allow(unsafe_code, reason = "a graph of the driver's")]
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: made by this context and destroyed once; the driver lets its work finish.
            let _ = unsafe { result::graph::exec_destroy(self.handle) };
        }
    }
}
