//! The kernels' twins on the CPU, on rayon's threads. Runs each step as it is recorded; GEMMs take their products from
//! vector instructions, where the machine has them.
//!
//! Recording allocates nothing on the thread that bound: what a twin needs beside its buffers is on the stack, or
//! was reserved by `bind` and is kept by the thread. Rayon's queues, and its threads the first time they compute,
//! allocate on their own.

#[cfg(target_arch = "x86_64")]
mod gemm;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use arrayvec::ArrayVec;

use crate::error::{Error, Result};
#[cfg(not(target_arch = "x86_64"))]
use crate::kernels::grouped_gemm::Twin;
use crate::kernels::{Access, Arguments, GroupedGemm, MAX_BINDINGS, Operation, Slot};
use crate::plan::{Backend, BufferSlice, Launch};
use crate::schedule::{DeviceFacts, Units};

/// The CPU backend.
#[derive(Debug, Clone, Copy)]
pub struct Cpu {
    facts: DeviceFacts,
    /// What `grouped_gemm` may use; without it the twin computes.
    #[cfg(target_arch = "x86_64")]
    instructions: Option<gemm::Instructions>,
}

impl Cpu {
    /// A CPU without limits but those of 32-bit word indices.
    pub fn new() -> Self {
        Self {
            facts: DeviceFacts {
                backend: "cpu",
                max_binding_bytes: (1 << 31) - 4,
                max_workgroups: 65_535,
                exact_halves: false,
                matrix_units: Units::None,
            },
            #[cfg(target_arch = "x86_64")]
            instructions: gemm::Instructions::detect(),
        }
    }

    /// A CPU that lowers as another device does, to compare the two step by step: it runs twins only.
    pub fn like(facts: DeviceFacts) -> Self {
        Self {
            facts,
            #[cfg(target_arch = "x86_64")]
            instructions: None,
        }
    }

    /// The products of a GEMM in this machine's vector instructions.
    #[cfg(target_arch = "x86_64")]
    fn fast<'a>(&self, operation: &'a Operation) -> Option<(&'a GroupedGemm, gemm::Fast<'a>)> {
        match operation {
            Operation::GroupedGemm(kernel) => Some((kernel, gemm::Fast::new(kernel, self.instructions?)?)),
            Operation::Norm(_)
            | Operation::TopkRouting(_)
            | Operation::Assign(_)
            | Operation::Permute(_)
            | Operation::Activate(_)
            | Operation::Quantize(_)
            | Operation::Amax(_)
            | Operation::Diagnose(_)
            | Operation::Combine(_)
            | Operation::Synthesize(_)
            | Operation::Stream(_) => None,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn fast<'a>(&self, _operation: &'a Operation) -> Option<(&'a GroupedGemm, Twin<'a>)> {
        None
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Shared memory of 32-bit words.
#[derive(Debug, Clone)]
pub struct CpuBuffer(Arc<RwLock<Vec<u32>>>);

impl CpuBuffer {
    /// A buffer with these words.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self(Arc::new(RwLock::new(words)))
    }

    /// A copy of its words.
    pub fn to_words(&self) -> Vec<u32> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn word(&self, at: usize) -> Option<u32> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(at).copied()
    }

    /// Replaces its first words.
    pub fn write(&self, first: usize, words: &[u32]) {
        let mut target = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (target, word) in target.iter_mut().skip(first).zip(words) {
            *target = *word;
        }
    }
}

/// A step with its buffers.
pub struct CpuBinding {
    slots: Vec<(&'static str, Access, CpuBuffer, usize, usize)>,
}

/// A buffer while a step has it.
enum Guard<'a> {
    Read(RwLockReadGuard<'a, Vec<u32>>),
    Write(RwLockWriteGuard<'a, Vec<u32>>),
}

/// Where steps run as they are recorded.
#[derive(Debug, Default)]
pub struct CpuEncoder;

impl Backend for Cpu {
    type Buffer = CpuBuffer;
    type Kernel = Operation;
    type Binding = CpuBinding;
    type Encoder = CpuEncoder;

    fn facts(&self) -> DeviceFacts {
        self.facts
    }

    fn create_buffer(&self, _name: &str, bytes: u64, _uniform: bool) -> Result<CpuBuffer> {
        let words = usize::try_from(bytes / 4).unwrap_or(usize::MAX);
        let mut memory = Vec::new();
        memory.try_reserve_exact(words).map_err(|error| Error::OutOfMemory {
            backend: "cpu",
            operation: format!("allocating {bytes} bytes"),
            reason: error.to_string(),
        })?;
        memory.resize(words, 0);
        Ok(CpuBuffer::from_words(memory))
    }

    fn buffer_bytes(&self, buffer: &CpuBuffer) -> u64 {
        4 * buffer.0.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn same_buffer(&self, a: &CpuBuffer, b: &CpuBuffer) -> bool {
        Arc::ptr_eq(&a.0, &b.0)
    }

    fn write(&self, buffer: &CpuBuffer, offset: u64, words: &[u32]) -> Result<()> {
        buffer.write(offset as usize / 4, words);
        Ok(())
    }

    fn compile(&self, _name: &str, operation: &Operation) -> Result<Operation> {
        Ok(operation.clone())
    }

    fn compile_all(&self, operations: &[(&str, &Operation)]) -> Result<Vec<Operation>> {
        operations.iter().map(|(name, operation)| self.compile(name, operation)).collect()
    }

    fn bind(&self, kernel: &Operation, slices: &[BufferSlice<'_, Self>]) -> Result<CpuBinding> {
        let bindings = kernel.source().bindings;
        let words = slices.iter().zip(&bindings).map(|(slice, binding)| (binding.name, slice.bytes as usize / 4));
        match self.fast(kernel) {
            Some((gemm, products)) => gemm.reserve(&products, words),
            None => kernel.reserve(words),
        }
        let slots = bindings.iter().zip(slices).map(|(binding, slice)| {
            let BufferSlice { buffer, offset, bytes } = slice;
            (binding.name, binding.access, (*buffer).clone(), *offset as usize / 4, *bytes as usize / 4)
        });
        Ok(CpuBinding { slots: slots.collect() })
    }

    fn copy_word(&self, _encoder: &mut CpuEncoder, from: (&CpuBuffer, u64), to: &CpuBuffer) {
        to.write(0, &[from.0.word(from.1 as usize / 4).unwrap_or(0)]);
    }

    fn launch(&self, _encoder: &mut CpuEncoder, launches: &mut dyn Iterator<Item = Launch<'_, Self>>) -> Result<()> {
        for Launch { kernel, binding, workgroups: _, params } in launches {
            let mut guards: ArrayVec<Guard<'_>, MAX_BINDINGS> = binding
                .slots
                .iter()
                .take(MAX_BINDINGS)
                .map(|(_, access, buffer, _, _)| match access {
                    Access::Uniform | Access::Read => {
                        Guard::Read(buffer.0.read().unwrap_or_else(PoisonError::into_inner))
                    }
                    Access::Write | Access::ReadWrite => {
                        Guard::Write(buffer.0.write().unwrap_or_else(PoisonError::into_inner))
                    }
                })
                .collect();
            let slots = guards.iter_mut().zip(&binding.slots).map(|(guard, &(name, access, _, offset, words))| {
                let offset = if access == Access::Uniform { params as usize / 4 } else { offset };
                let slot = match guard {
                    Guard::Read(memory) => memory.get(offset..offset + words).map(Slot::Read),
                    Guard::Write(memory) => {
                        memory.get_mut(offset..offset + words).map(|words| Slot::Write(Some(words)))
                    }
                };
                slot.map(|slot| (name, slot)).ok_or_else(|| {
                    Error::invalid(name, "a short buffer", format!("{words} words at {offset}"), "give a larger one")
                })
            });
            let slots: ArrayVec<_, MAX_BINDINGS> = slots.collect::<Result<_>>()?;
            let mut arguments = Arguments::new(slots);
            match self.fast(kernel) {
                Some((gemm, products)) => gemm.run_with(&mut arguments, &products)?,
                None => kernel.run(&mut arguments)?,
            }
        }
        Ok(())
    }
}
