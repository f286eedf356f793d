//! WGSL through wgpu: Vulkan, Metal, DX12.
//!
//! Takes clones of the host's device and queue and asks for nothing: [`required_features`] and
//! [`required_limits`] say what a host should request. Never sets handlers; waits only for [`Wgpu::proofs`].

mod proofs;

use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};

use ::wgpu;

use crate::error::{Error, Result};
use crate::kernels::{Access, Operation};
use crate::plan::{Backend, BufferSlice, Launch};
use crate::schedule::{DeviceFacts, Units};

pub use proofs::Proofs;

/// Features that a host must request for the kernels of this version: none.
pub fn required_features() -> wgpu::Features {
    wgpu::Features::empty()
}

/// Limits that a host must request at least: WebGPU's defaults. Larger `max_storage_buffer_binding_size`
/// and `max_buffer_size` mean fewer and larger weight segments and token chunks.
pub fn required_limits() -> wgpu::Limits {
    wgpu::Limits::default()
}

/// A host's device and queue. Clones share their compiled kernels: the layers of a model, which mostly
/// differ in their weights only, compile once.
#[derive(Debug, Clone)]
pub struct Wgpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    max_binding_bytes: u64,
    /// Kernels by their whole source text.
    kernels: Arc<Mutex<HashMap<String, Arc<WgpuKernel>>>>,
    proofs: Arc<OnceLock<Proofs>>,
    checked: bool,
    cache: Option<wgpu::PipelineCache>,
}

/// A pipeline with its layout.
#[derive(Debug)]
pub struct WgpuKernel {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    uniform: bool,
}

impl Wgpu {
    /// Clones of the host's handles.
    pub fn new(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let limits = device.limits();
        let max_binding_bytes = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        Self {
            device,
            queue,
            max_binding_bytes,
            kernels: Arc::default(),
            proofs: Arc::default(),
            checked: false,
            cache: None,
        }
    }

    /// The same device with smaller bindings: weights and activations are cut finer.
    #[must_use]
    pub fn with_binding_limit(&self, bytes: u64) -> Self {
        Self { max_binding_bytes: self.max_binding_bytes.min(bytes), ..self.clone() }
    }

    /// The same device with wgpu's run-time checks in every kernel: index clamps and loop bounds, which the GEMMs go
    /// without. For a search after a fault: they change no result.
    #[must_use]
    pub fn with_runtime_checks(&self) -> Self {
        Self { checked: true, kernels: Arc::default(), ..self.clone() }
    }

    /// The same device, which compiles its kernels with the host's pipeline cache: those that the cache has need no
    /// compilation, and the others are in it afterwards. The host creates it (on a device with
    /// [`wgpu::Features::PIPELINE_CACHE`]) and keeps its data where it likes; one cache may serve all that a host
    /// compiles.
    #[must_use]
    pub fn with_pipeline_cache(&self, cache: wgpu::PipelineCache) -> Self {
        Self { cache: Some(cache), ..self.clone() }
    }

    /// Whether every kernel has them.
    pub fn has_runtime_checks(&self) -> bool {
        self.checked
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// The queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// Runs our own calls under error scopes, so that no refusal reaches the host's handler.
    pub(crate) fn scoped<T>(&self, operation: &dyn Fn() -> String, call: impl FnOnce() -> T) -> Result<T> {
        let filters = [wgpu::ErrorFilter::Internal, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Validation];
        let mut scopes: Vec<_> = filters.into_iter().map(|filter| self.device.push_error_scope(filter)).collect();
        let value = call();
        let mut failure = None;
        while let Some(scope) = scopes.pop() {
            // On native adapters the answer is there at once; a browser's comes later, through the
            // host's own handling.
            if let Poll::Ready(Some(error)) = pin!(scope.pop()).poll(&mut Context::from_waker(Waker::noop())) {
                failure = Some(error);
            }
        }
        let backend = "wgpu";
        match failure {
            None if self.is_lost() => Err(Error::DeviceLost { backend, operation: operation() }),
            None => Ok(value),
            Some(wgpu::Error::OutOfMemory { source }) => {
                Err(Error::OutOfMemory { backend, operation: operation(), reason: source.to_string() })
            }
            Some(error) => Err(Error::Device { backend, operation: operation(), reason: error.to_string() }),
        }
    }

    /// A module; the index clamps and loop bounds that wgpu adds are left out of those whose bounds are proved.
    #[allow(unsafe_code, reason = "trusted modules")]
    fn module(&self, operation: &Operation, descriptor: wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule {
        let proved = match operation {
            Operation::GroupedGemm(_) | Operation::Permute(_) | Operation::Quantize(_) | Operation::Combine(_) => true,
            // A hash table's ids index the scores, and come from the checkpoint.
            Operation::TopkRouting(kernel) => !kernel.reads_table(),
            Operation::Norm(_)
            | Operation::Assign(_)
            | Operation::Activate(_)
            | Operation::Amax(_)
            | Operation::Diagnose(_)
            | Operation::Synthesize(_)
            | Operation::Stream(_) => false,
        };
        if !proved || self.checked {
            return self.device.create_shader_module(descriptor);
        }
        // SAFETY: every index that these kernels form is within its binding, and their loops end.
        // - Rows: a row is below `token_count() * ROWS_PER_TOKEN`, or comes from `sorted_rows`, which only `permute`
        //   writes, from such rows. `token_count()` is at most the chunk that `lower` sized every buffer of rows for,
        //   and `bind` requires of a caller's buffers the size in the schedule.
        // - Slots: ids that a caller wrote are compared with the number of matrices before they index anything;
        //   tiles come from `permute`, which knows no others.
        // - Weights: `spans` and the segments are packed by `PackedMatrix` for this kernel's own shape and uploaded
        //   whole; rows are cut at `row_end`, columns and blocks at their last.
        // - Experts: `topk_routing` ranks its own outputs; a place that no rank fills holds output 0.
        // - Workgroup memory is indexed by the invocation and by constants of the prelude, which `const_assert`s
        //   relate, or by an output or slot below the array's own length.
        // - Loops count to constants or to such bounds, in steps that are not 0.
        unsafe { self.device.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) }
    }

    /// Whether the device is lost. wgpu tells that to a callback, which is the host's, and answers no call with it;
    /// but a lost device does not even refuse a buffer that cannot be.
    fn is_lost(&self) -> bool {
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let usage = wgpu::BufferUsages::STORAGE;
        let impossible = wgpu::BufferDescriptor { label: None, size: !3, usage, mapped_at_creation: false };
        drop(self.device.create_buffer(&impossible));
        matches!(pin!(scope.pop()).poll(&mut Context::from_waker(Waker::noop())), Poll::Ready(None))
    }
}

impl Backend for Wgpu {
    type Buffer = wgpu::Buffer;
    type Kernel = Arc<WgpuKernel>;
    type Binding = wgpu::BindGroup;
    type Encoder = wgpu::CommandEncoder;

    fn facts(&self) -> DeviceFacts {
        DeviceFacts {
            backend: "wgpu",
            max_binding_bytes: self.max_binding_bytes,
            max_workgroups: self.device.limits().max_compute_workgroups_per_dimension,
            exact_halves: self.proofs().exact_halves,
            matrix_units: Units::None,
        }
    }

    fn create_buffer(&self, name: &str, bytes: u64, uniform: bool) -> Result<wgpu::Buffer> {
        let kind = if uniform { wgpu::BufferUsages::UNIFORM } else { wgpu::BufferUsages::STORAGE };
        let usage = kind | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
        let descriptor = wgpu::BufferDescriptor { label: Some(name), size: bytes, usage, mapped_at_creation: false };
        self.scoped(&|| format!("creating buffer {name} of {bytes} bytes"), || self.device.create_buffer(&descriptor))
    }

    fn buffer_bytes(&self, buffer: &wgpu::Buffer) -> u64 {
        buffer.size()
    }

    fn same_buffer(&self, a: &wgpu::Buffer, b: &wgpu::Buffer) -> bool {
        a == b
    }

    fn write(&self, buffer: &wgpu::Buffer, offset: u64, words: &[u32]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(words);
        self.scoped(&|| format!("writing {} bytes", bytes.len()), || {
            self.queue.write_buffer(buffer, offset, bytes);
            // A submission of nothing lets the queue start the copy and reuse its staging memory.
            if bytes.len() >= 1 << 20 {
                self.queue.submit([]);
            }
        })
    }

    fn compile(&self, name: &str, operation: &Operation) -> Result<Arc<WgpuKernel>> {
        let source = operation.source();
        let text = source.wgsl();
        let known = self.kernels.lock().unwrap_or_else(PoisonError::into_inner).get(&text).cloned();
        if let Some(kernel) = known {
            return Ok(kernel);
        }
        let entries: Vec<_> = source
            .bindings
            .iter()
            .enumerate()
            .map(|(number, binding)| wgpu::BindGroupLayoutEntry {
                binding: number as u32,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match binding.access {
                        Access::Uniform => wgpu::BufferBindingType::Uniform,
                        Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
                        Access::Write | Access::ReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
                    },
                    has_dynamic_offset: binding.access == Access::Uniform,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let uniform = source.bindings.iter().any(|binding| binding.access == Access::Uniform);
        let kernel = self.scoped(&|| format!("compiling {} for {name}", source.kernel()), || {
            let module = self.module(
                operation,
                wgpu::ShaderModuleDescriptor {
                    label: Some(source.kernel()),
                    source: wgpu::ShaderSource::Wgsl(text.as_str().into()),
                },
            );
            let layout = self
                .device
                .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
            let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(name),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
            let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(name),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some("main"),
                // No kernel reads what it has not written, and one invocation clears the memory on some devices.
                compilation_options: wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: self.cache.as_ref(),
            });
            Arc::new(WgpuKernel { pipeline, layout, uniform })
        })?;
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Arc::clone(kernels.entry(text).or_insert(kernel)))
    }

    /// On rayon's threads: a driver takes milliseconds to seconds for a kernel, and compiles several at once. Error
    /// scopes are a thread's own, and each kernel opens and closes its scopes where it is compiled.
    #[cfg(not(target_arch = "wasm32"))]
    fn compile_all(&self, operations: &[(&str, &Operation)]) -> Result<Vec<Arc<WgpuKernel>>> {
        use rayon::prelude::*;
        let compiled = operations.par_iter().map(|(name, operation)| self.compile(name, operation));
        // Rayon would give any of several errors; a list keeps them in order.
        compiled.collect::<Vec<_>>().into_iter().collect()
    }

    /// A browser has one thread, and compiles on its own.
    #[cfg(target_arch = "wasm32")]
    fn compile_all(&self, operations: &[(&str, &Operation)]) -> Result<Vec<Arc<WgpuKernel>>> {
        operations.iter().map(|(name, operation)| self.compile(name, operation)).collect()
    }

    fn bind(&self, kernel: &Arc<WgpuKernel>, slices: &[BufferSlice<'_, Self>]) -> Result<wgpu::BindGroup> {
        let entries: Vec<_> = slices
            .iter()
            .enumerate()
            .map(|(number, slice)| wgpu::BindGroupEntry {
                binding: number as u32,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: slice.buffer,
                    offset: slice.offset,
                    size: wgpu::BufferSize::new(slice.bytes),
                }),
            })
            .collect();
        self.scoped(&|| "binding buffers (storage usage is required)".into(), || {
            self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &kernel.layout,
                entries: &entries,
            })
        })
    }

    fn copy_word(&self, encoder: &mut wgpu::CommandEncoder, from: (&wgpu::Buffer, u64), to: &wgpu::Buffer) {
        encoder.copy_buffer_to_buffer(from.0, from.1, to, 0, 4);
    }

    fn launch(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        launches: &mut dyn Iterator<Item = Launch<'_, Self>>,
    ) -> Result<()> {
        if self.is_lost() {
            return Err(Error::DeviceLost { backend: "wgpu", operation: "recording".into() });
        }
        let mut pass =
            encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("moewe"), timestamp_writes: None });
        for Launch { kernel, binding, workgroups: [x, y, z], params } in launches {
            if x > 0 && y > 0 && z > 0 {
                pass.set_pipeline(&kernel.pipeline);
                pass.set_bind_group(0, binding, if kernel.uniform { std::slice::from_ref(&params) } else { &[] });
                pass.dispatch_workgroups(x, y, z);
            }
        }
        Ok(())
    }
}
