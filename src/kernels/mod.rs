//! One file a stage: its contract (constants, bindings, fragments, grid, layout) and its CPU twin.
//!
//! Nothing here touches a device. A kernel struct is plain data; [`Source`] is what a WGSL backend
//! compiles, [`Operation::run`] is what the `cpu` backend runs. Both come from the same fields.

pub mod activation;
pub mod assign;
pub mod combine;
pub mod diagnose;
pub mod grouped_gemm;
pub mod norm;
pub mod pack;
pub mod permute;
pub mod quantize;
pub mod stream;
pub mod synthesize;
pub mod topk_routing;

use std::fmt::Write as _;

use arrayvec::ArrayVec;

use crate::error::{Error, Result};
use crate::numerics;
use crate::spec::FloatType;

pub use activation::Activate;
pub use assign::{Assign, AssignBy, ExpertSlots};
pub use combine::Combine;
pub use diagnose::{Counted, Diagnose};
pub use grouped_gemm::{Activated, Epilogue, GemmVariant, GroupedGemm, RowSource, RowValues};
pub use norm::{Norm, NormScale};
pub use permute::Permute;
pub use quantize::{Amax, Matrices, Quantize, RowScale, ScaleLayout, ValueSource};
pub use stream::Stream;
pub use synthesize::Synthesize;
pub use topk_routing::TopkRouting;

/// A stage of the layer. Folder of its shaders, stem of its file here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Rows times the matrices of their groups; also the router's and the shared expert's GEMMs.
    GroupedGemm,
    /// RMS norm of rows.
    Norm,
    /// Logits to ids and weights.
    TopkRouting,
    /// Which matrix a row meets.
    Assign,
    /// Rows in order of their matrices.
    Permute,
    /// Gate and up to what the second GEMM reads, alone.
    Activation,
    /// Rows to codes and scales, alone or behind the activation.
    Quantize,
    /// Counts that explain accuracy.
    Diagnose,
    /// Weighted sum over slots.
    Combine,
    /// Weights that are a hash of their place; of no layer.
    Synthesize,
    /// Memory, read; of no layer.
    Stream,
}

impl Stage {
    /// The stage's name, as its folder has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::GroupedGemm => "grouped_gemm",
            Self::Norm => "norm",
            Self::TopkRouting => "topk_routing",
            Self::Assign => "assign",
            Self::Permute => "permute",
            Self::Activation => "activation",
            Self::Quantize => "quantize",
            Self::Diagnose => "diagnose",
            Self::Combine => "combine",
            Self::Synthesize => "synthesize",
            Self::Stream => "stream",
        }
    }
}

/// What a step of a schedule computes.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    /// See [`GroupedGemm`].
    GroupedGemm(GroupedGemm),
    /// See [`Norm`].
    Norm(Norm),
    /// See [`TopkRouting`].
    TopkRouting(TopkRouting),
    /// See [`Assign`].
    Assign(Assign),
    /// See [`Permute`].
    Permute(Permute),
    /// See [`Activate`].
    Activate(Activate),
    /// See [`Quantize`].
    Quantize(Quantize),
    /// See [`Amax`].
    Amax(Amax),
    /// See [`Diagnose`].
    Diagnose(Diagnose),
    /// See [`Combine`].
    Combine(Combine),
    /// See [`Synthesize`].
    Synthesize(Synthesize),
    /// See [`Stream`].
    Stream(Stream),
}

impl Operation {
    /// Its stage.
    pub fn stage(&self) -> Stage {
        match self {
            Self::GroupedGemm(_) => Stage::GroupedGemm,
            Self::Norm(_) => Stage::Norm,
            Self::TopkRouting(_) => Stage::TopkRouting,
            Self::Assign(_) => Stage::Assign,
            Self::Permute(_) => Stage::Permute,
            Self::Activate(_) => Stage::Activation,
            Self::Quantize(_) | Self::Amax(_) => Stage::Quantize,
            Self::Diagnose(_) => Stage::Diagnose,
            Self::Combine(_) => Stage::Combine,
            Self::Synthesize(_) => Stage::Synthesize,
            Self::Stream(Stream) => Stage::Stream,
        }
    }

    /// Its WGSL contract.
    pub fn source(&self) -> Source {
        match self {
            Self::GroupedGemm(kernel) => kernel.source(),
            Self::Norm(kernel) => kernel.source(),
            Self::TopkRouting(kernel) => kernel.source(),
            Self::Assign(kernel) => kernel.source(),
            Self::Permute(kernel) => kernel.source(),
            Self::Activate(kernel) => kernel.source(),
            Self::Quantize(kernel) => kernel.source(),
            Self::Amax(kernel) => kernel.source(),
            Self::Diagnose(kernel) => kernel.source(),
            Self::Combine(kernel) => kernel.source(),
            Self::Synthesize(kernel) => kernel.source(),
            Self::Stream(Stream) => Stream::source(),
        }
    }

    /// From which of its buffers its kernel has boxes copied, in the order in which it takes their maps.
    pub fn boxes(&self) -> ArrayVec<Boxes, MAX_BOXES> {
        let Self::GroupedGemm(kernel) = self else { return ArrayVec::new() };
        kernel.boxes()
    }

    /// Bytes of workgroup memory, for kernels whose need grows with the spec.
    pub fn workgroup_bytes(&self) -> usize {
        match self {
            Self::TopkRouting(kernel) => kernel.workgroup_bytes(),
            Self::Permute(kernel) => kernel.workgroup_bytes(),
            // Fixed, 12 KiB at most; the contracts test measures them.
            Self::GroupedGemm(_)
            | Self::Norm(_)
            | Self::Assign(_)
            | Self::Activate(_)
            | Self::Combine(_)
            | Self::Quantize(_)
            | Self::Amax(_)
            | Self::Diagnose(_)
            | Self::Synthesize(_)
            | Self::Stream(Stream) => 0,
        }
    }

    /// Makes room, on this thread, for what its twin needs beside buffers of so many words, by binding.
    pub(crate) fn reserve(&self, words: impl Iterator<Item = (&'static str, usize)>) {
        match self {
            Self::GroupedGemm(kernel) => kernel.reserve(&grouped_gemm::Twin(kernel), words),
            Self::Norm(_)
            | Self::TopkRouting(_)
            | Self::Assign(_)
            | Self::Permute(_)
            | Self::Activate(_)
            | Self::Quantize(_)
            | Self::Amax(_)
            | Self::Diagnose(_)
            | Self::Combine(_)
            | Self::Synthesize(_)
            | Self::Stream(Stream) => {}
        }
    }

    /// Its twin: the same function on the same buffers, in Rust.
    ///
    /// # Errors
    /// A binding that is missing or too short: a fault of the schedule.
    pub fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        match self {
            Self::GroupedGemm(kernel) => kernel.run(arguments),
            Self::Norm(kernel) => kernel.run(arguments),
            Self::TopkRouting(kernel) => kernel.run(arguments),
            Self::Assign(kernel) => kernel.run(arguments),
            Self::Permute(kernel) => kernel.run(arguments),
            Self::Activate(kernel) => kernel.run(arguments),
            Self::Quantize(kernel) => kernel.run(arguments),
            Self::Amax(kernel) => kernel.run(arguments),
            Self::Diagnose(kernel) => kernel.run(arguments),
            Self::Combine(kernel) => kernel.run(arguments),
            Self::Synthesize(kernel) => kernel.run(arguments),
            Self::Stream(Stream) => Stream::run(arguments),
        }
    }
}

/// How a kernel touches a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `var<uniform>`.
    Uniform,
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`, written only.
    Write,
    /// `var<storage, read_write>`, read and written.
    ReadWrite,
}

/// A binding as a kernel declares it. Its position in the list is its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Name in the shader and in the twin.
    pub name: &'static str,
    /// WGSL type.
    pub element: &'static str,
    /// Access.
    pub access: Access,
}

/// The binding with the number of tokens, which every kernel of a layer has.
const PARAMS: Binding = Binding { name: "params", element: "Params", access: Access::Uniform };

const fn read(name: &'static str, element: &'static str) -> Binding {
    Binding { name, element, access: Access::Read }
}

const fn write(name: &'static str, element: &'static str) -> Binding {
    Binding { name, element, access: Access::Write }
}

const fn read_write(name: &'static str, element: &'static str) -> Binding {
    Binding { name, element, access: Access::ReadWrite }
}

/// A constant of the generated prelude.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// `u32`.
    U32(u32),
    /// `f32`.
    F32(f32),
    /// `bool`.
    Bool(bool),
}

/// A piece of WGSL or CUDA C++ with the path it has under `shaders/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Path under `shaders/`.
    pub path: &'static str,
    /// Text.
    pub text: &'static str,
}

impl Fragment {
    fn is_cuda(&self) -> bool {
        self.path.ends_with(".cu")
    }
}

macro_rules! shader {
    ($path:literal) => {
        $crate::kernels::Fragment { path: $path, text: include_str!(concat!("../../shaders/", $path)) }
    };
}
use shader;

/// Everything a WGSL kernel is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// Constants under the names of the spec's fields.
    pub constants: Vec<(&'static str, Value)>,
    /// Bindings, by number.
    pub bindings: Vec<Binding>,
    /// Fragments that fill the kernel's slots, in order of use; the kernel itself comes last. One in CUDA C++ calls
    /// the fragments' functions; see the backend `cuda`.
    pub fragments: Vec<Fragment>,
}

impl Source {
    /// The WGSL module: prelude of constants and bindings, fragments, kernel. Entry point `main`, unless the kernel is in
    /// CUDA C++.
    pub fn wgsl(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.constants {
            let (kind, literal) = match value {
                Value::U32(value) => ("u32", format!("{value}u")),
                Value::F32(value) => ("f32", format!("{value:?}f")),
                Value::Bool(value) => ("bool", value.to_string()),
            };
            let _ = writeln!(text, "const {name}: {kind} = {literal};");
        }
        for (number, Binding { name, element, access }) in self.bindings.iter().enumerate() {
            let space = match access {
                Access::Uniform => "uniform",
                Access::Read => "storage, read",
                Access::Write | Access::ReadWrite => "storage, read_write",
            };
            let _ = writeln!(text, "@group(0) @binding({number}) var<{space}> {name}: {element};");
        }
        for fragment in self.fragments.iter().filter(|fragment| !fragment.is_cuda()) {
            let _ = write!(text, "\n// {}\n{}", fragment.path, fragment.text);
        }
        text
    }

    /// The kernel's text and what stands before it, if it is in CUDA C++.
    pub fn cuda(&self) -> Option<String> {
        let texts: Vec<_> = self.fragments.iter().filter(|part| part.is_cuda()).map(|part| part.text).collect();
        (!texts.is_empty()).then(|| texts.join("\n"))
    }

    /// Name of the kernel: path of its last fragment without the suffix.
    pub fn kernel(&self) -> &'static str {
        let path = self.fragments.last().map_or("", |fragment| fragment.path);
        path.trim_end_matches(".wgsl").trim_end_matches(".cu")
    }
}

/// Most maps of a kernel.
pub const MAX_BOXES: usize = 1;

/// A buffer of rows from which the device copies boxes for a kernel in CUDA C++: columns of some rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boxes {
    /// Binding.
    pub buffer: &'static str,
    /// Bytes of a row, from one row to the next.
    pub row_bytes: u64,
    /// Rows of a matrix.
    pub rows: u64,
    /// Bytes from one matrix to the next.
    pub matrix_bytes: u64,
    /// Rows of a box, 128 bytes each.
    pub box_rows: u32,
}

/// The fragment that reads one value of a row, with what it needs.
fn input_fragments(float_type: FloatType) -> Vec<Fragment> {
    match float_type {
        FloatType::F32 => vec![shader!("fragments/input_f32.wgsl")],
        FloatType::F16 => vec![shader!("fragments/decode_f16.wgsl"), shader!("fragments/input_f16.wgsl")],
        FloatType::Bf16 => vec![shader!("fragments/input_bf16.wgsl")],
    }
}

/// The fragment `round_model`, with what it needs.
fn round_fragments(model: FloatType) -> Vec<Fragment> {
    match model {
        FloatType::F32 => vec![shader!("fragments/round_f32.wgsl")],
        FloatType::F16 => vec![
            shader!("fragments/decode_f16.wgsl"),
            shader!("fragments/encode_f16.wgsl"),
            shader!("fragments/round_f16.wgsl"),
        ],
        FloatType::Bf16 => vec![shader!("fragments/encode_bf16.wgsl"), shader!("fragments/round_bf16.wgsl")],
    }
}

/// What a kernel in CUDA C++ says of its blocks, where they share no more than its text declares.
fn cuda_blocks(threads: u32) -> [(&'static str, Value); 3] {
    [("THREADS", Value::U32(threads)), ("BLOCKS", Value::U32(1)), ("SHARED_BYTES", Value::U32(0))]
}

/// Each fragment once, where it is first needed.
fn unique(fragments: Vec<Fragment>) -> Vec<Fragment> {
    let mut once: Vec<Fragment> = Vec::with_capacity(fragments.len());
    for fragment in fragments {
        if !once.contains(&fragment) {
            once.push(fragment);
        }
    }
    once
}

/// Value `index` of rows of `float_type`. Twin: shaders/fragments/input_*.wgsl
fn decode_value(words: &[u32], float_type: FloatType, index: usize) -> f32 {
    let half = |word: u32| (word >> (16 * (index % 2))) as u16;
    match float_type {
        FloatType::F32 => f32::from_bits(words[index]),
        FloatType::F16 => numerics::decode_f16(half(words[index / 2])),
        FloatType::Bf16 => numerics::decode_bf16(half(words[index / 2])),
    }
}

/// Most bindings of a kernel: WebGPU's default limits have 8 storage buffers, and there is one uniform.
pub const MAX_BINDINGS: usize = 9;

/// The buffers of one step, by binding, while its twin runs. On the stack: recording allocates nothing.
pub struct Arguments<'a> {
    slots: ArrayVec<(&'static str, Slot<'a>), MAX_BINDINGS>,
}

/// One buffer of a step, as words.
pub enum Slot<'a> {
    /// Read only.
    Read(&'a [u32]),
    /// Written; taken once.
    Write(Option<&'a mut [u32]>),
}

impl<'a> Arguments<'a> {
    /// Buffers by their bindings' names; those beyond [`MAX_BINDINGS`], which no kernel has, are left out.
    pub fn new(slots: impl IntoIterator<Item = (&'static str, Slot<'a>)>) -> Self {
        Self { slots: slots.into_iter().take(MAX_BINDINGS).collect() }
    }

    fn lacks(name: &'static str) -> Error {
        Error::invalid(name, "no such binding", "a binding of this step", "this is a fault of the schedule")
    }

    fn read(&self, name: &'static str) -> Result<&'a [u32]> {
        self.slots
            .iter()
            .find_map(|(slot, buffer)| match buffer {
                Slot::Read(words) if *slot == name => Some(*words),
                Slot::Read(_) | Slot::Write(_) => None,
            })
            .ok_or_else(|| Self::lacks(name))
    }

    fn read_f32(&self, name: &'static str) -> Result<&'a [f32]> {
        Ok(bytemuck::cast_slice(self.read(name)?))
    }

    fn read_i32(&self, name: &'static str) -> Result<&'a [i32]> {
        Ok(bytemuck::cast_slice(self.read(name)?))
    }

    fn write(&mut self, name: &'static str) -> Result<&'a mut [u32]> {
        self.slots
            .iter_mut()
            .find_map(|(slot, buffer)| match buffer {
                Slot::Write(words) if *slot == name => words.take(),
                Slot::Read(_) | Slot::Write(_) => None,
            })
            .ok_or_else(|| Self::lacks(name))
    }

    /// Tokens before this chunk.
    fn first_token(&self) -> Result<u32> {
        self.read(PARAMS.name)?.get(1).copied().ok_or_else(|| Self::lacks(PARAMS.name))
    }

    /// Tokens of this chunk: twin of `token_count` in shaders/fragments/params.wgsl.
    fn tokens(&self) -> Result<usize> {
        match self.read(PARAMS.name)? {
            [total, first, chunk, ..] => Ok(total.saturating_sub(*first).min(*chunk) as usize),
            _ => Err(Self::lacks(PARAMS.name)),
        }
    }
}
