//! `grouped_gemm`: rows times the matrices of their groups, activation in the epilogue.
//!
//! `out[r, f] = activate(W[group(r)] rows[r / input_divisor] + bias)`, f32 [rows, features].
//! A row is token * `top_k` + slot for routed experts, a token for the router and the shared expert.
//! Tolerance against the twin: the order of an f32 sum and the device's `exp` are free (Bounded).

use rayon::prelude::*;

use super::pack::{PackedMatrix, SPAN_WORDS};
use super::{Access, Arguments, Fragment, PARAMS, Source, Value, input_fragments, read, shader, write};
use crate::error::Result;
use crate::numerics;
use crate::spec::{Activation, FloatType, WeightFormat};

/// Rows of a tile of the tiled kernel.
pub const TILE_ROWS: usize = 64;
/// Columns of a tile of the tiled kernel, in packed rows.
pub const TILE_COLS: usize = 64;
/// Vectors of 4 columns that the gemv kernel stages at once: 8 KiB.
const STAGE_QUADS: u32 = 512;

/// Which matrix a row meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowSource {
    /// There is one matrix; a row is a token.
    Direct,
    /// `expert_slots[topk_ids[row]]`; a row is token * `top_k` + slot.
    Routed {
        /// k.
        top_k: usize,
        /// E.
        num_experts: usize,
    },
}

/// How the work is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GemmVariant {
    /// One workgroup for some matrix rows and one row: a matrix-vector product.
    Gemv {
        /// Invocations of a workgroup.
        workgroup_size: u32,
        /// Invocations that share a matrix row: a power of two.
        lanes: u32,
        /// Matrix rows of a workgroup.
        tile_rows: u32,
    },
    /// One workgroup for 64 rows of a group and 64 matrix rows.
    Tiled,
}

/// One GEMM over one segment of a packed matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedGemm {
    /// Which matrix a row meets.
    pub rows: RowSource,
    /// How the work is cut.
    pub variant: GemmVariant,
    /// Type of the rows that enter.
    pub input: FloatType,
    /// Rows that share an entering row: k for the routed gate and up, else 1.
    pub input_divisor: usize,
    /// Packed rows of a group.
    pub matrix_rows: usize,
    /// Columns.
    pub cols: usize,
    /// Type of the weights.
    pub format: WeightFormat,
    /// 2 if gate and up rows alternate, else 1.
    pub pair: usize,
    /// Whether each matrix row has a bias.
    pub bias: bool,
    /// What the epilogue does; `None` stores the sums.
    pub activation: Option<Activation>,
}

impl GroupedGemm {
    /// Width of a result row.
    pub fn features(&self) -> usize {
        self.matrix_rows / self.pair
    }

    fn rows_per_token(&self) -> usize {
        match self.rows {
            RowSource::Direct => 1,
            RowSource::Routed { top_k, num_experts: _ } => top_k,
        }
    }

    /// The packed matrix without its places: what indexing needs.
    fn layout(&self) -> PackedMatrix {
        PackedMatrix {
            name: "",
            groups: 1,
            rows: self.matrix_rows,
            cols: self.cols,
            format: self.format,
            pair: self.pair,
            bias: self.bias,
            segments: Vec::new(),
        }
    }

    pub(super) fn source(&self) -> Source {
        let layout = self.layout();
        let mut constants = vec![
            ("COLS", Value::U32(self.cols as u32)),
            ("OUT_COLS", Value::U32(self.features() as u32)),
            ("PAIR", Value::U32(self.pair as u32)),
            ("VECS_PER_ROW", Value::U32(layout.vecs_per_row() as u32)),
            ("INPUT_DIVISOR", Value::U32(self.input_divisor as u32)),
        ];
        let mut bindings = vec![
            PARAMS,
            read("rows", "array<u32>"),
            read("segment", "array<vec4<u32>>"),
            read("spans", "array<vec4<u32>>"),
            write("out", "array<f32>"),
        ];
        let mut fragments = vec![shader!("fragments/params.wgsl"), shader!("fragments/span.wgsl")];
        fragments.extend(input_fragments(self.input));
        let decode_f16 = shader!("fragments/decode_f16.wgsl");
        if self.format == WeightFormat::F16 && !fragments.contains(&decode_f16) {
            fragments.push(decode_f16);
        }
        fragments.push(match self.format {
            WeightFormat::F32 => shader!("fragments/weight_f32.wgsl"),
            WeightFormat::F16 => shader!("fragments/weight_f16.wgsl"),
            WeightFormat::Bf16 => shader!("fragments/weight_bf16.wgsl"),
            WeightFormat::Fp8Block { block: _, scale: _ } => shader!("fragments/weight_fp8_block.wgsl"),
        });
        match layout.blocks() {
            None => fragments.push(shader!("fragments/scale_none.wgsl")),
            Some(([block_rows, block_cols], per_row)) => {
                fragments.push(shader!("fragments/scale_block.wgsl"));
                constants.push(("BLOCK_ROWS", Value::U32(block_rows as u32)));
                constants.push(("BLOCK_COLS", Value::U32(block_cols as u32)));
                constants.push(("BLOCKS_PER_ROW", Value::U32(per_row as u32)));
            }
        }
        fragments.push(if self.bias {
            shader!("fragments/bias_rows.wgsl")
        } else {
            shader!("fragments/bias_none.wgsl")
        });
        fragments.extend(activation_fragments(self.activation, &mut constants));
        let expert_slots = read("expert_slots", "array<i32>");
        match (self.variant, self.rows) {
            (GemmVariant::Gemv { workgroup_size, lanes, tile_rows }, rows) => {
                constants.push(("ROWS_PER_TOKEN", Value::U32(self.rows_per_token() as u32)));
                constants.push(("WORKGROUP_SIZE", Value::U32(workgroup_size)));
                constants.push(("LANES", Value::U32(lanes)));
                constants.push(("TILE_ROWS", Value::U32(tile_rows)));
                constants.push(("STAGE_QUADS", Value::U32(STAGE_QUADS)));
                match rows {
                    RowSource::Direct => fragments.push(shader!("fragments/group_single.wgsl")),
                    RowSource::Routed { top_k: _, num_experts } => {
                        constants.push(("NUM_EXPERTS", Value::U32(num_experts as u32)));
                        bindings.extend([read("topk_ids", "array<i32>"), expert_slots]);
                        fragments.push(shader!("fragments/group_routed.wgsl"));
                    }
                }
                fragments.push(shader!("grouped_gemm/gemv.wgsl"));
            }
            (GemmVariant::Tiled, rows) => {
                constants.push(("TILE_M", Value::U32(TILE_ROWS as u32)));
                match rows {
                    RowSource::Direct => {
                        constants.push(("ROWS_PER_TOKEN", Value::U32(1)));
                        fragments.push(shader!("fragments/tiles_direct.wgsl"));
                    }
                    RowSource::Routed { top_k: _, num_experts: _ } => {
                        bindings.extend([
                            read("sorted_rows", "array<u32>"),
                            read("tiles", "array<vec4<u32>>"),
                            expert_slots,
                        ]);
                        fragments.push(shader!("fragments/tiles_permuted.wgsl"));
                    }
                }
                fragments.push(shader!("grouped_gemm/tiled.wgsl"));
            }
        }
        if matches!(self.variant, GemmVariant::Tiled)
            && matches!(self.rows, RowSource::Routed { top_k: _, num_experts: _ })
        {
            // The list of tiles says how many rows there are.
            bindings.retain(|binding| binding.access != Access::Uniform);
            fragments.retain(|fragment| fragment.path != "fragments/params.wgsl");
        }
        Source { constants, bindings, fragments }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.read("rows")?;
        let segment = arguments.read("segment")?;
        let spans = arguments.read("spans")?;
        let slots: Vec<i32> = match (self.variant, self.rows) {
            (
                GemmVariant::Gemv { workgroup_size: _, lanes: _, tile_rows: _ } | GemmVariant::Tiled,
                RowSource::Direct,
            ) => {
                vec![0; arguments.tokens()?]
            }
            (
                GemmVariant::Gemv { workgroup_size: _, lanes: _, tile_rows: _ },
                RowSource::Routed { top_k, num_experts: _ },
            ) => {
                let expert_slots = arguments.read_i32("expert_slots")?;
                let ids = &arguments.read_i32("topk_ids")?[..arguments.tokens()? * top_k];
                let slot = |id: &i32| usize::try_from(*id).ok().and_then(|id| expert_slots.get(id).copied());
                ids.iter().map(|id| slot(id).unwrap_or(-1)).collect()
            }
            (GemmVariant::Tiled, RowSource::Routed { top_k: _, num_experts: _ }) => {
                let expert_slots = arguments.read_i32("expert_slots")?;
                let sorted_rows = arguments.read("sorted_rows")?;
                let tiles = arguments.read("tiles")?;
                let mut slots = vec![-1; sorted_rows.len()];
                for tile in tiles.chunks_exact(4).skip(1).take(tiles[0] as usize) {
                    let (first, count) = (tile[1] as usize, tile[2] as usize);
                    for &row in &sorted_rows[first..first + count] {
                        slots[row as usize] = expert_slots[tile[0] as usize];
                    }
                }
                slots
            }
        };
        let layout = self.layout();
        let features = self.features();
        let out: &mut [f32] = bytemuck::cast_slice_mut(arguments.write("out")?);
        // One task per row and stretch of features, so that a single token uses every thread as well.
        const STRETCH: usize = 64;
        let stretches = features.div_ceil(STRETCH);
        let mut tasks: Vec<(usize, usize, &mut [f32])> = Vec::with_capacity(slots.len() * stretches);
        for (row, out) in out.chunks_exact_mut(features).enumerate().take(slots.len()) {
            tasks.extend(out.chunks_mut(STRETCH).enumerate().map(|(stretch, out)| (row, stretch * STRETCH, out)));
        }
        let row_words = layout.vecs_per_row() * 4;
        tasks.into_par_iter().for_each(|(row, first, out)| {
            let Ok(slot) = usize::try_from(slots[row]) else { return };
            let span = &spans[slot * SPAN_WORDS..][..SPAN_WORDS];
            let [begin, end] = [span[0] as usize, span[1] as usize];
            let x = decode_row(rows, self.input, row / self.input_divisor, self.cols, row_words * 4);
            for (feature, out) in (first..).zip(out) {
                let packed = feature * self.pair;
                if packed < begin || packed >= end {
                    continue;
                }
                let value = |packed: usize| {
                    let codes = 4 * span[2] as usize + (packed - begin) * row_words;
                    let sum = dot(&layout, segment, span, codes, packed, &x);
                    let bias = if self.bias { segment[span[4] as usize + packed - begin] } else { 0 };
                    sum + f32::from_bits(bias)
                };
                let gate = value(packed);
                *out = match self.activation {
                    None => gate,
                    Some(activation) => {
                        let up = if self.pair == 2 { value(packed + 1) } else { gate };
                        numerics::activate(activation, gate, up)
                    }
                };
            }
        });
        Ok(())
    }
}

/// One entering row as f32, padded with zeros to `padded` columns.
fn decode_row(words: &[u32], float_type: FloatType, row: usize, cols: usize, padded: usize) -> Vec<f32> {
    let mut values = vec![0.0; padded];
    for (col, value) in values.iter_mut().enumerate().take(cols) {
        let index = row * cols + col;
        let half = |word: u32| (word >> (16 * (index % 2))) as u16;
        *value = match float_type {
            FloatType::F32 => f32::from_bits(words[index]),
            FloatType::F16 => numerics::decode_f16(half(words[index / 2])),
            FloatType::Bf16 => numerics::decode_bf16(half(words[index / 2])),
        };
    }
    values
}

/// One packed row times x: one f32 partial sum a vector, scaled where the format has scales.
fn dot(layout: &PackedMatrix, segment: &[u32], span: &[u32], codes: usize, packed: usize, x: &[f32]) -> f32 {
    let per_vec = layout.codes_per_vec();
    let words = &segment[codes..codes + layout.vecs_per_row() * 4];
    let mut sum = 0.0f32;
    for (vec, (words, x)) in words.chunks_exact(4).zip(x.chunks_exact(per_vec)).enumerate() {
        let mut partial = 0.0f32;
        match layout.format {
            WeightFormat::F32 => {
                for (word, x) in words.iter().zip(x) {
                    partial += f32::from_bits(*word) * x;
                }
            }
            WeightFormat::Bf16 => {
                for (word, x) in words.iter().zip(x.chunks_exact(2)) {
                    partial += f32::from_bits(word << 16) * x[0] + f32::from_bits(word & 0xffff_0000) * x[1];
                }
            }
            WeightFormat::F16 => {
                for (word, x) in words.iter().zip(x.chunks_exact(2)) {
                    partial += numerics::decode_f16(*word as u16) * x[0];
                    partial += numerics::decode_f16((word >> 16) as u16) * x[1];
                }
            }
            WeightFormat::Fp8Block { block: _, scale: _ } => {
                for (word, x) in words.iter().zip(x.chunks_exact(4)) {
                    for (code, x) in word.to_le_bytes().iter().zip(x) {
                        partial += numerics::decode_e4m3(*code) * x;
                    }
                }
            }
        }
        sum += match layout.blocks() {
            None => partial,
            Some(([block_rows, block_cols], per_row)) => {
                let block = packed / (layout.pair * block_rows) - span[5] as usize;
                let row = block * layout.pair + packed % layout.pair;
                partial * f32::from_bits(segment[span[3] as usize + row * per_row + vec * per_vec / block_cols])
            }
        };
    }
    sum
}

fn activation_fragments(activation: Option<Activation>, constants: &mut Vec<(&'static str, Value)>) -> Vec<Fragment> {
    let silu = shader!("fragments/silu.wgsl");
    let limit_name = "SWIGLU_LIMIT";
    match activation {
        None => vec![shader!("fragments/activate_none.wgsl")],
        Some(Activation::Swiglu { limit: None }) => vec![silu, shader!("fragments/activate_swiglu.wgsl")],
        Some(Activation::Swiglu { limit: Some(limit) }) => {
            constants.push((limit_name, Value::F32(limit)));
            vec![silu, shader!("fragments/activate_swiglu_clamped.wgsl")]
        }
        Some(Activation::SwigluClampAfter { limit }) => {
            constants.push((limit_name, Value::F32(limit)));
            vec![silu, shader!("fragments/activate_swiglu_clamped_after.wgsl")]
        }
        Some(Activation::SwigluOai { alpha, limit, beta }) => {
            constants.push(("SWIGLU_ALPHA", Value::F32(alpha)));
            constants.push(("SWIGLU_BETA", Value::F32(beta)));
            match limit {
                None => vec![silu, shader!("fragments/activate_swiglu_oai.wgsl")],
                Some(limit) => {
                    constants.push((limit_name, Value::F32(limit)));
                    vec![silu, shader!("fragments/activate_swiglu_oai_clamped.wgsl")]
                }
            }
        }
        Some(Activation::Relu2) => vec![shader!("fragments/activate_relu2.wgsl")],
        // `lower` refuses these by name before a kernel is made.
        Some(Activation::Situ { beta: _, linear_beta: _ } | Activation::GeluTanh | Activation::GeluErf) => Vec::new(),
    }
}
