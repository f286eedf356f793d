//! `grouped_gemm`: rows times the matrices of their groups, and what an epilogue makes of the sums.
//!
//! `out[r, f] = epilogue(W[group(r)] rows[r / input_divisor] + bias)`, f32 [rows, features].
//! A row is token * `top_k` + slot for routed experts, else token * groups + group.
//! Tolerance against the twin: the order of an f32 sum and the device's `exp` are free (Bounded).
//! A long file: the contract and the twin beside each other.

use std::cell::Cell;
use std::ops::Range;

use arrayvec::ArrayVec;
use rayon::prelude::*;

use super::pack::{PackedBlocks, PackedMatrix, SPAN_WORDS};
use super::quantize::ScaleLayout;
use super::{
    Access, Arguments, Binding, Boxes, Fragment, MAX_BOXES, PARAMS, Source, Value, cuda_blocks, decode_value,
    input_fragments, read, round_fragments, shader, unique, write,
};
use crate::error::Result;
use crate::numerics;
use crate::spec::{Activation, ActivationCode, ActivationRounding, FloatType, LoraDelta, Rounding};
use crate::weights::{Code, PackedScale, Parts};

/// Rows of a tile of the tiled kernel.
pub const TILE_ROWS: usize = 64;
/// Columns of a tile of the tiled kernel, in packed rows.
pub const TILE_COLS: usize = 64;
/// Warps of a block on matrix units.
const MMA_WARPS: usize = 4;

/// Warps that share the columns of a block of so many rows; the others have matrix rows of their own, and what they
/// read of the rows is the same.
fn mma_warps_by_columns(rows: usize) -> usize {
    match rows {
        0..=16 => MMA_WARPS,
        17..=32 => 2,
        _ => 1,
    }
}

/// Matrix rows of a block on matrix units: 32 a warp.
pub fn mma_matrix_rows(rows: usize) -> usize {
    32 * MMA_WARPS / mma_warps_by_columns(rows)
}

/// Warpgroups of a block that multiply; one more copies.
const WGMMA_MULTIPLIERS: u32 = 2;
/// Rows of results that a warpgroup puts in order at once, where they are bf16: 16 bytes more than its 64 columns each.
const WGMMA_ORDERED_BYTES: usize = 32 * (128 + 16);
/// Bytes that the blocks of a multiprocessor share, less what the device takes of each and what they may lose to alignment.
const WGMMA_SHARED_BYTES: usize = 224 << 10;

/// Rows of a tile of codes, where they fill it: 64 a warpgroup.
pub const WGMMA_CODE_ROWS: usize = 64 * WGMMA_MULTIPLIERS as usize;

/// Blocks of a multiprocessor on matrix units of warpgroups: one finishes while the other multiplies, where there is
/// room for two.
pub fn wgmma_blocks(rows: usize) -> usize {
    if rows <= 64 { 2 } else { 1 }
}

/// Vectors of 4 columns that the gemv kernel stages at once: 8 KiB.
const STAGE_QUADS: usize = 512;
/// Likewise the kernel of some rows, of all of them: 12 KiB.
const ROWS_STAGE_QUADS: usize = 768;

/// Which matrix a row meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowSource {
    /// That of its group: a row is token * `groups` + group.
    Direct {
        /// Matrices; 1 but for several shared experts.
        groups: usize,
    },
    /// `row_slots[row]`; a row is token * `top_k` + slot.
    Routed {
        /// k.
        top_k: usize,
        /// Matrices.
        num_slots: usize,
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
    /// One workgroup for some matrix rows and 2, 4 or 8 rows of a group, for which it decodes a weight once.
    Rows {
        /// Invocations of a workgroup.
        workgroup_size: u32,
        /// Invocations that share a matrix row: a power of two.
        lanes: u32,
        /// Matrix rows of a workgroup.
        tile_rows: u32,
        /// Rows of a group: 2, 4 or 8.
        rows: usize,
    },
    /// One workgroup for 64 rows of a group and 64 matrix rows.
    Tiled,
    /// One block for some rows of a group and 32 matrix rows, on matrix units: CUDA alone.
    Mma {
        /// Rows of a group: a multiple of 8, at most 64.
        rows: usize,
    },
    /// As many blocks as the device holds for some rows of a group and 128 matrix rows each, again and again, on matrix
    /// units of warpgroups: CUDA alone.
    Wgmma {
        /// Rows of a group: 16, 32, 64 or 160, or 128 of codes.
        rows: usize,
        /// Blocks of [`GroupedGemm::wgmma_matrix_rows`] matrix rows.
        matrix_blocks: usize,
        /// Of tiles that codes fill, whose weights are copied by boxes: vectors of 16 bytes from one matrix of the segment
        /// to the next.
        matrix_vecs: Option<usize>,
    },
}

impl GemmVariant {
    /// Most rows of a tile, where it walks tiles.
    pub fn tile_rows(self) -> Option<usize> {
        match self {
            Self::Gemv { workgroup_size: _, lanes: _, tile_rows: _ } => None,
            Self::Rows { workgroup_size: _, lanes: _, tile_rows: _, rows } => Some(rows),
            Self::Tiled => Some(TILE_ROWS),
            Self::Mma { rows } | Self::Wgmma { rows, matrix_blocks: _, matrix_vecs: _ } => Some(rows),
        }
    }
}

/// What the kernel on matrix units needs to know of its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MatrixUnits {
    /// 0 for bf16, 1 for E4M3, 2 for E2M1 with a power of two a vector.
    weights: u32,
    /// Whether rows are f32, which are two bf16 each.
    input_f32: bool,
    /// Values of an entering row in 16 bytes.
    inputs_per_vec: u32,
    /// Columns whose products are one sum before scales act; 0 for all.
    sum_cols: u32,
}

/// What the rows that enter hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowValues {
    /// Numbers.
    Floats(FloatType),
    /// Codes, four to a word, each row padded to whole words, and their scales.
    Codes {
        /// Type of a code.
        code: ActivationCode,
        /// Columns that share a scale; `None` for one a row.
        group: Option<usize>,
        /// How the scales lie.
        scales: ScaleLayout,
    },
}

impl RowValues {
    /// Values from one row's first to the next row's.
    fn stride(self, cols: usize) -> usize {
        match self {
            Self::Floats(_) => cols,
            Self::Codes { code: _, group: _, scales: _ } => cols.next_multiple_of(4),
        }
    }
}

/// One GEMM over one segment of a packed matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedGemm {
    /// Which matrix a row meets.
    pub rows: RowSource,
    /// How the work is cut.
    pub variant: GemmVariant,
    /// What the rows that enter hold.
    pub input: RowValues,
    /// Rows that share an entering row: the rows of a token for gate and up, else 1.
    pub input_divisor: usize,
    /// Whether routing weights multiply the entering rows, and how the product is rounded.
    pub weigh_input: Option<Rounding>,
    /// Packed rows of a group.
    pub matrix_rows: usize,
    /// Columns.
    pub cols: usize,
    /// Codes and scales of the weights.
    pub parts: Parts,
    /// 2 if gate and up rows alternate, else 1.
    pub pair: usize,
    /// Whether each matrix row has a bias.
    pub bias: bool,
    /// How what adapters add, f32 [rows, matrix rows], joins the sums before their bias; none without adapters.
    pub delta: Option<LoraDelta>,
    /// Whether rows without a matrix are written: zeros for -1, NaN for any other. Else they are left.
    pub fill_absent: bool,
    /// What becomes of the sums.
    pub epilogue: Epilogue,
    /// Type in which the results stand: f32, or bf16 if the epilogue has rounded to that and the variant is on matrix
    /// units.
    pub stored: FloatType,
    /// T, where anything is rounded.
    pub model: FloatType,
    /// Whether the device unpacks each binary16 exactly.
    pub exact_halves: bool,
}

/// What a GEMM does with its sums, bias included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Epilogue {
    /// Stores them.
    Sums,
    /// `+ previous_router_states * router_states_scale`.
    AddState,
    /// The erf GELU of each.
    GeluErf,
    /// Times the routing weight, rounded to T.
    Weighted,
    /// Gate and up to what the second GEMM reads.
    Activation(Activated),
}

/// From gate and up to what the second GEMM reads, in an epilogue or in front of a quantisation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Activated {
    /// Which activation.
    pub activation: Activation,
    /// Rounding of gate and up.
    pub gate_up: Rounding,
    /// Roundings behind that.
    pub rounding: ActivationRounding,
    /// Whether routing weights multiply the result.
    pub weighted: bool,
}

impl Activated {
    /// Twin: shaders/fragments/epilogue_activation.wgsl
    pub(super) fn apply(&self, model: FloatType, gate_up: [f32; 2], weight: Option<f32>) -> f32 {
        let [gate, up] = gate_up.map(|value| match self.gate_up {
            Rounding::F32 => value,
            Rounding::Model => numerics::round_to(model, value),
        });
        let [gate, up] = numerics::activate_parts(self.activation, gate, up);
        let model = |value| numerics::round_to(model, value);
        let weigh = |value: f32| weight.map_or(value, |weight| value * weight);
        match self.rounding {
            ActivationRounding::F32 => weigh(gate * up),
            ActivationRounding::Fused => model(weigh(gate * up)),
            ActivationRounding::Torch => model(weigh(model(model(gate) * model(up)))),
        }
    }

    /// The fragment `finish`, and those that it needs.
    pub(super) fn fragments(&self, constants: &mut Vec<(&'static str, Value)>) -> Vec<Fragment> {
        let (parts, hidden) = match self.rounding {
            ActivationRounding::F32 => (false, false),
            ActivationRounding::Fused => (false, true),
            ActivationRounding::Torch => (true, true),
        };
        constants.push(("ROUND_GATE_UP", Value::Bool(self.gate_up == Rounding::Model)));
        constants.push(("ROUND_PARTS", Value::Bool(parts)));
        constants.push(("ROUND_HIDDEN", Value::Bool(hidden)));
        let mut fragments = activation_fragments(self.activation, constants);
        fragments.push(match self.weighted {
            true => shader!("fragments/hidden_weighted.wgsl"),
            false => shader!("fragments/hidden_unweighted.wgsl"),
        });
        fragments.push(shader!("fragments/epilogue_activation.wgsl"));
        fragments
    }
}

impl GroupedGemm {
    /// Width of a result row.
    pub fn features(&self) -> usize {
        self.matrix_rows / self.feature_rows()
    }

    /// Packed rows that yield a value.
    fn feature_rows(&self) -> usize {
        match self.epilogue {
            Epilogue::Activation(_) => self.pair,
            Epilogue::Sums | Epilogue::AddState | Epilogue::GeluErf | Epilogue::Weighted => 1,
        }
    }

    /// Columns whose products are one f32 sum before scales act, where rows of codes meet blocks: the smaller
    /// of the two blocks, which divides the other.
    pub fn k_block(&self) -> Option<usize> {
        let RowValues::Codes { code: _, group, scales: _ } = self.input else { return None };
        let weights = self.layout().blocks().filter(|blocks| blocks.per_row > 1).map(|blocks| blocks.cols);
        group.into_iter().chain(weights).min()
    }

    /// Vectors of 16 bytes of a packed row.
    pub fn vecs_per_row(&self) -> usize {
        self.layout().vecs_per_row()
    }

    /// Vectors of a packed row that meet what the kernel of `rows` rows stages at once.
    pub fn staged_vecs(&self, rows: usize) -> usize {
        (4 * ROWS_STAGE_QUADS / rows / self.layout().codes_per_vec()).min(self.vecs_per_row())
    }

    /// Vectors of 16 bytes of an entering row that meet one of a packed row, where the gemv kernel reads them from
    /// memory; `None` where it stages the entering row first, because it is weighted, no whole vectors, or longer
    /// than the caches' lines favour.
    fn input_vecs(&self) -> Option<usize> {
        let bits = match self.input {
            RowValues::Floats(FloatType::F32) => 32,
            // Built from their bits, a value each.
            RowValues::Floats(FloatType::F16) => return None,
            RowValues::Floats(FloatType::Bf16) => 16,
            RowValues::Codes { code: _, group: _, scales: _ } => 8,
        };
        let per_vec = self.layout().codes_per_vec();
        let whole =
            self.cols.is_multiple_of(per_vec) && self.weigh_input.is_none() && (per_vec * bits).is_multiple_of(128);
        Some(per_vec * bits / 128).filter(|vecs| whole && (1..=2).contains(vecs))
    }

    /// What the kernel on matrix units needs to know of the operands; `None` where it lacks them: other formats, rows
    /// that are no whole vectors, weights or scales that act on the operands themselves.
    pub fn matrix_units(&self) -> Option<MatrixUnits> {
        let layout = self.layout();
        let blocks = layout.blocks();
        let per_vec = layout.codes_per_vec();
        let no_act_order = blocks.is_none_or(|blocks| !blocks.act_order);
        if self.weigh_input.is_some() || !self.cols.is_multiple_of(per_vec) || !no_act_order {
            return None;
        }
        let floats = |weights: u32| match self.input {
            RowValues::Floats(FloatType::Bf16) => {
                Some(MatrixUnits { weights, input_f32: false, inputs_per_vec: 8, sum_cols: 0 })
            }
            RowValues::Floats(FloatType::F32) => {
                Some(MatrixUnits { weights, input_f32: true, inputs_per_vec: 4, sum_cols: 0 })
            }
            RowValues::Floats(FloatType::F16) | RowValues::Codes { code: _, group: _, scales: _ } => None,
        };
        let scale = blocks.map(|blocks| (blocks.scale, blocks.cols));
        match (self.parts.code, scale, self.input) {
            (Code::Bf16, None, RowValues::Floats(_)) => floats(0),
            (Code::E2m1, Some((PackedScale::E8m0, 32)), RowValues::Floats(_)) => floats(2),
            (
                Code::E4m3,
                None | Some((PackedScale::F32 | PackedScale::E8m0 | PackedScale::Bf16, _)),
                RowValues::Codes { code: ActivationCode::E4m3, group: _, scales: _ },
            ) => {
                // A sum of a warp is of whole vectors of its lanes, and no longer than what it holds in registers.
                let sum_cols = match self.k_block() {
                    None => 0,
                    Some(cols @ (64 | 128 | 256)) => cols as u32,
                    Some(_) => return None,
                };
                Some(MatrixUnits { weights: 1, input_f32: false, inputs_per_vec: 16, sum_cols })
            }
            (
                Code::F32 | Code::F16 | Code::Bf16 | Code::E4m3 | Code::E2m1 | Code::Int8 | Code::Int4 | Code::Uint4,
                _,
                RowValues::Floats(_) | RowValues::Codes { code: _, group: _, scales: _ },
            ) => None,
        }
    }

    /// Whether the kernel on matrix units of warpgroups can read the operands: rows as they lie in memory; codes with a
    /// scale for each 128 columns of a row, and f32 scales that the matrix rows of a warpgroup share, or those of gate and
    /// those of up among them.
    pub fn fits_warpgroups(&self) -> bool {
        let Some(MatrixUnits { weights: _, input_f32, inputs_per_vec: _, sum_cols }) = self.matrix_units() else {
            return false;
        };
        match self.input {
            RowValues::Floats(_) => !input_f32,
            RowValues::Codes { code: _, group, scales } => {
                let by_group = match scales {
                    ScaleLayout::RowMajor | ScaleLayout::ColumnMajor { stride: _ } => group == Some(128),
                    ScaleLayout::Packed => false,
                };
                let shared = self.layout().blocks().is_some_and(|blocks| {
                    blocks.scale == PackedScale::F32 && (blocks.rows * self.pair).is_multiple_of(64)
                });
                by_group && shared && sum_cols == 128
            }
        }
    }

    /// Matrix rows of a block on matrix units of warpgroups: as many as the registers of two hold the sums of.
    pub fn wgmma_matrix_rows(&self, rows: usize) -> usize {
        match self.parts.code {
            Code::Bf16 if wgmma_blocks(rows) == 1 => 256,
            Code::F32 | Code::F16 | Code::Bf16 | Code::E4m3 | Code::E2m1 | Code::Int8 | Code::Int4 | Code::Uint4 => 128,
        }
    }

    fn rows_per_token(&self) -> usize {
        match self.rows {
            RowSource::Direct { groups } => groups,
            RowSource::Routed { top_k, num_slots: _ } => top_k,
        }
    }

    /// The packed matrix without its places: what indexing needs.
    pub(crate) fn layout(&self) -> PackedMatrix {
        PackedMatrix {
            name: "",
            groups: 1,
            rows: self.matrix_rows,
            cols: self.cols,
            parts: self.parts,
            pair: self.pair,
            bias: self.bias,
            segments: Vec::new(),
        }
    }

    pub(super) fn source(&self) -> Source {
        let layout = self.layout();
        let mut constants = vec![
            ("OUT_COLS", Value::U32(self.features() as u32)),
            ("FEATURE_ROWS", Value::U32(self.feature_rows() as u32)),
            ("VECS_PER_ROW", Value::U32(layout.vecs_per_row() as u32)),
            ("INPUT_DIVISOR", Value::U32(self.input_divisor as u32)),
        ];
        let direct = match self.variant {
            GemmVariant::Gemv { workgroup_size: _, lanes: _, tile_rows: _ } => self.input_vecs(),
            GemmVariant::Rows { workgroup_size: _, lanes: _, tile_rows: _, rows: _ }
            | GemmVariant::Tiled
            | GemmVariant::Mma { rows: _ }
            | GemmVariant::Wgmma { rows: _, matrix_blocks: _, matrix_vecs: _ } => None,
        };
        let units = match self.variant {
            GemmVariant::Mma { rows: _ } | GemmVariant::Wgmma { rows: _, matrix_blocks: _, matrix_vecs: _ } => {
                self.matrix_units()
            }
            GemmVariant::Gemv { workgroup_size: _, lanes: _, tile_rows: _ }
            | GemmVariant::Rows { workgroup_size: _, lanes: _, tile_rows: _, rows: _ }
            | GemmVariant::Tiled => None,
        };
        // Rows that are read by whole vectors need neither their columns nor their stride.
        let by_vectors = direct.is_some() || units.is_some();
        if !by_vectors {
            constants.push(("COLS", Value::U32(self.cols as u32)));
            constants.push(("INPUT_STRIDE", Value::U32(self.input.stride(self.cols) as u32)));
        }
        let mut bindings = vec![
            PARAMS,
            read("rows", if by_vectors { "array<vec4<u32>>" } else { "array<u32>" }),
            read("segment", "array<vec4<u32>>"),
            read("spans", "array<vec4<u32>>"),
            write("out", "array<f32>"),
        ];
        let mut fragments = vec![shader!("fragments/params.wgsl"), shader!("fragments/span.wgsl")];
        if units.is_none() {
            fragments.extend(self.row_fragments(direct.is_some()));
        }
        match self.input {
            RowValues::Floats(_) => fragments.push(shader!("fragments/input_scale_none.wgsl")),
            RowValues::Codes { code: _, group, scales } => {
                bindings.push(read("input_scales", "array<u32>"));
                match group {
                    None => fragments.push(shader!("fragments/input_scale_row.wgsl")),
                    Some(group) => {
                        constants.push(("INPUT_GROUP", Value::U32(group as u32)));
                        constants.push(("INPUT_GROUPS", Value::U32(self.cols.div_ceil(group) as u32)));
                        fragments.push(match scales {
                            ScaleLayout::RowMajor => shader!("fragments/input_scale_row_major.wgsl"),
                            ScaleLayout::ColumnMajor { stride } => {
                                constants.push(("INPUT_SCALE_STRIDE", Value::U32(stride as u32)));
                                shader!("fragments/input_scale_column_major.wgsl")
                            }
                            ScaleLayout::Packed => shader!("fragments/input_scale_packed.wgsl"),
                        });
                    }
                }
            }
        }
        weight_fragments(&layout, self.exact_halves, &mut constants, &mut fragments);
        fragments.push(if self.bias {
            shader!("fragments/bias_rows.wgsl")
        } else {
            shader!("fragments/bias_none.wgsl")
        });
        fragments.extend(round_fragments(self.model));
        fragments.push(match self.delta {
            None => shader!("fragments/delta_none.wgsl"),
            Some(delta) => {
                bindings.push(read("delta", "array<f32>"));
                constants.push(("MATRIX_ROWS", Value::U32(self.matrix_rows as u32)));
                match delta {
                    LoraDelta::F32 => shader!("fragments/delta_f32.wgsl"),
                    LoraDelta::Model => shader!("fragments/delta_model.wgsl"),
                }
            }
        });
        let mut weighted = false;
        fragments.push(match self.weigh_input {
            None => shader!("fragments/input_unweighted.wgsl"),
            Some(rounding) => {
                weighted = true;
                constants.push(("ROUND_INPUT", Value::Bool(rounding == Rounding::Model)));
                shader!("fragments/input_weighted.wgsl")
            }
        });
        match self.epilogue {
            Epilogue::Sums => fragments.push(shader!("fragments/epilogue_sums.wgsl")),
            Epilogue::AddState => {
                bindings.push(read("previous_router_states", "array<f32>"));
                bindings.push(read("router_states_scale", "array<f32>"));
                fragments.push(shader!("fragments/epilogue_add_state.wgsl"));
            }
            Epilogue::GeluErf => {
                fragments.extend([shader!("fragments/gelu_erf.wgsl"), shader!("fragments/epilogue_gelu.wgsl")]);
            }
            Epilogue::Weighted => {
                fragments.push(shader!("fragments/epilogue_weighted.wgsl"));
                weighted = true;
            }
            Epilogue::Activation(activated) => {
                fragments.extend(activated.fragments(&mut constants));
                weighted = weighted || activated.weighted;
            }
        }
        if weighted {
            bindings.push(read("topk_weights", "array<f32>"));
        }
        match (self.variant, self.rows) {
            (GemmVariant::Gemv { workgroup_size, lanes, tile_rows }, rows) => {
                constants.push(("ROWS_PER_TOKEN", Value::U32(self.rows_per_token() as u32)));
                constants.push(("WORKGROUP_SIZE", Value::U32(workgroup_size)));
                constants.push(("LANES", Value::U32(lanes)));
                constants.push(("TILE_ROWS", Value::U32(tile_rows)));
                constants.push(("QUADS", Value::U32(layout.codes_per_vec() as u32 / 4)));
                constants.push(("SCALES_PER_VEC", Value::U32(layout.scales_per_vec() as u32)));
                fragments.extend(match direct {
                    None => {
                        constants.push(("STAGE_QUADS", Value::U32(STAGE_QUADS as u32)));
                        vec![shader!("fragments/input_quad.wgsl"), shader!("fragments/entering_staged.wgsl")]
                    }
                    Some(vecs) => {
                        let row = layout.vecs_per_row() * vecs;
                        constants.push(("INPUT_VECS", Value::U32(vecs as u32)));
                        constants.push(("INPUT_ROW_VECS", Value::U32(row as u32)));
                        vec![shader!("fragments/entering_direct.wgsl")]
                    }
                });
                constants.push(("PAIR", Value::U32(self.pair as u32)));
                constants.push(("FILL_ABSENT", Value::Bool(self.fill_absent)));
                match rows {
                    RowSource::Direct { groups } => {
                        constants.push(("GROUPS", Value::U32(groups as u32)));
                        fragments.push(shader!("fragments/group_single.wgsl"));
                    }
                    RowSource::Routed { top_k: _, num_slots } => {
                        constants.push(("NUM_SLOTS", Value::U32(num_slots as u32)));
                        bindings.push(read("row_slots", "array<i32>"));
                        fragments.push(shader!("fragments/group_routed.wgsl"));
                    }
                }
                fragments.extend([
                    shader!("fragments/quartet.wgsl"),
                    shader!("fragments/lane_sums.wgsl"),
                    shader!("grouped_gemm/gemv.wgsl"),
                ]);
            }
            (GemmVariant::Rows { workgroup_size, lanes, tile_rows, rows }, source) => {
                constants.push(("WORKGROUP_SIZE", Value::U32(workgroup_size)));
                constants.push(("LANES", Value::U32(lanes)));
                constants.push(("TILE_ROWS", Value::U32(tile_rows)));
                constants.push(("ROWS", Value::U32(rows as u32)));
                constants.push(("STAGE_QUADS", Value::U32((ROWS_STAGE_QUADS / rows) as u32)));
                constants.push(("QUADS", Value::U32(layout.codes_per_vec() as u32 / 4)));
                constants.push(("SCALES_PER_VEC", Value::U32(layout.scales_per_vec() as u32)));
                constants.push(("PAIR", Value::U32(self.pair as u32)));
                tile_source(source, rows, &mut constants, &mut bindings, &mut fragments);
                fragments.extend([
                    shader!("fragments/quartet.wgsl"),
                    shader!("fragments/lane_sums.wgsl"),
                    shader!("fragments/input_quad.wgsl"),
                    shader!("fragments/rows_staged.wgsl"),
                    shader!("grouped_gemm/rows.wgsl"),
                ]);
            }
            (GemmVariant::Tiled, rows) => {
                constants.push(("BLOCK_SUMS", Value::Bool(self.k_block().is_some())));
                constants.push(("K_BLOCK", Value::U32(self.k_block().unwrap_or(self.cols) as u32)));
                if layout.blocks().is_some() {
                    constants.push(("PAIR", Value::U32(self.pair as u32)));
                }
                tile_source(rows, TILE_ROWS, &mut constants, &mut bindings, &mut fragments);
                fragments.push(shader!("grouped_gemm/tiled.wgsl"));
            }
            (GemmVariant::Mma { rows }, source) => {
                // A kernel that does not fit has no constants, and no compiler takes it: `lower` plans none.
                let MatrixUnits { weights, input_f32, inputs_per_vec, sum_cols } = units.unwrap_or_default();
                constants.push(("ROWS", Value::U32(rows as u32)));
                constants.push(("WEIGHT_KIND", Value::U32(weights)));
                constants.push(("INPUT_CODES", Value::Bool(inputs_per_vec == 16)));
                constants.push(("INPUT_F32", Value::Bool(input_f32)));
                constants.push(("INPUTS_PER_VEC", Value::U32(inputs_per_vec)));
                constants.push(("SUM_COLS", Value::U32(sum_cols)));
                constants.push(("WARPS_BY_COLUMNS", Value::U32(mma_warps_by_columns(rows) as u32)));
                constants.push(("STORE_BF16", Value::Bool(self.stored == FloatType::Bf16)));
                constants.push(("PAIR", Value::U32(self.pair as u32)));
                constants.extend(cuda_blocks(32 * MMA_WARPS as u32));
                tile_source(source, rows, &mut constants, &mut bindings, &mut fragments);
                fragments.push(shader!("grouped_gemm/mma.cu"));
            }
            (GemmVariant::Wgmma { rows, matrix_blocks, matrix_vecs }, source) => {
                // As above.
                let MatrixUnits { weights, input_f32: _, inputs_per_vec: _, sum_cols: _ } = units.unwrap_or_default();
                let blocks = wgmma_blocks(rows);
                let shared_bytes = WGMMA_SHARED_BYTES / blocks;
                // Rows in order, of a warpgroup or of each of its warps; and a row and its weight for each warpgroup.
                let (ordered_bytes, listed_bytes) = match matrix_vecs {
                    Some(_) => (2 * WGMMA_ORDERED_BYTES, 0),
                    None => (WGMMA_ORDERED_BYTES, 8 * rows * WGMMA_MULTIPLIERS as usize),
                };
                let ordered_bytes = match self.stored {
                    FloatType::Bf16 => ordered_bytes * WGMMA_MULTIPLIERS as usize,
                    FloatType::F32 | FloatType::F16 => 0,
                };
                let height = self.wgmma_matrix_rows(rows);
                let [weight_bytes, input_bytes, scales] = match weights {
                    2 => [64, 256, height],
                    _ => [128, 128, rows + 8],
                };
                // Two barriers a stage; a ring begins at a multiple of 1 KiB.
                let stage = height * weight_bytes + rows * input_bytes + 4 * scales + 16;
                // What a multiprocessor has, between those who copy and those who hold sums.
                let [of_copiers, of_multipliers] = match rows {
                    0..=32 => [64, 88],
                    33..=64 => [48, 96],
                    _ => [56, 224],
                };
                let [scale_column, scale_row] = match self.input {
                    RowValues::Floats(_) => [0, 0],
                    RowValues::Codes { code: _, group, scales } => match (group, scales) {
                        (Some(_), ScaleLayout::ColumnMajor { stride }) => [stride, 1],
                        (Some(group), ScaleLayout::RowMajor | ScaleLayout::Packed) => [1, self.cols.div_ceil(group)],
                        (None, _) => [0, 0],
                    },
                };
                constants.push(("THREADS", Value::U32(128 * (1 + WGMMA_MULTIPLIERS))));
                constants.push(("MULTIPLIERS", Value::U32(WGMMA_MULTIPLIERS)));
                constants.push(("BLOCKS", Value::U32(blocks as u32)));
                constants.push(("SHARED_BYTES", Value::U32(shared_bytes as u32)));
                constants.push((
                    "STAGES",
                    Value::U32(((shared_bytes - 1024 - ordered_bytes - listed_bytes) / stage) as u32),
                ));
                constants.push(("COPIER_REGISTERS", Value::U32(of_copiers)));
                constants.push(("REGISTERS", Value::U32(of_multipliers)));
                constants.push(("ROWS", Value::U32(rows as u32)));
                constants.push(("HEIGHT", Value::U32(height as u32)));
                constants.push(("MATRIX_BLOCKS", Value::U32(matrix_blocks as u32)));
                constants.push(("WEIGHT_KIND", Value::U32(weights)));
                constants.push(("INPUT_SCALE_COLUMN", Value::U32(scale_column as u32)));
                constants.push(("INPUT_SCALE_ROW", Value::U32(scale_row as u32)));
                constants.push(("STORE_BF16", Value::Bool(self.stored == FloatType::Bf16)));
                constants.push(("PAIR", Value::U32(self.pair as u32)));
                constants.push(("WEIGHTED_ROWS", Value::Bool(self.epilogue == Epilogue::Weighted)));
                if self.epilogue != Epilogue::Weighted {
                    fragments.push(shader!("fragments/rows_unweighted.wgsl"));
                }
                tile_source(source, rows, &mut constants, &mut bindings, &mut fragments);
                fragments.push(shader!("fragments/warpgroups.cu"));
                fragments.push(match matrix_vecs {
                    Some(vecs) => {
                        constants.push(("MATRIX_VECS", Value::U32(vecs as u32)));
                        shader!("grouped_gemm/wgmma_codes.cu")
                    }
                    None => shader!("grouped_gemm/wgmma.cu"),
                });
            }
        }
        Source { constants, bindings, fragments: unique(fragments) }
    }

    /// The weights, where they are copied so.
    pub(super) fn boxes(&self) -> ArrayVec<Boxes, MAX_BOXES> {
        match self.variant {
            GemmVariant::Wgmma { rows, matrix_blocks: _, matrix_vecs: Some(matrix_vecs) } => {
                let box_rows = self.wgmma_matrix_rows(rows) as u32;
                let row_bytes = 16 * self.vecs_per_row() as u64;
                let (rows, matrix_bytes) = (self.matrix_rows as u64, 16 * matrix_vecs as u64);
                ArrayVec::from([Boxes { buffer: "segment", row_bytes, rows, matrix_bytes, box_rows }])
            }
            GemmVariant::Gemv { workgroup_size: _, lanes: _, tile_rows: _ }
            | GemmVariant::Rows { workgroup_size: _, lanes: _, tile_rows: _, rows: _ }
            | GemmVariant::Tiled
            | GemmVariant::Mma { rows: _ }
            | GemmVariant::Wgmma { rows: _, matrix_blocks: _, matrix_vecs: None } => ArrayVec::new(),
        }
    }

    /// What reads the rows that enter: from memory by vectors, or value by value.
    fn row_fragments(&self, direct: bool) -> Vec<Fragment> {
        match (self.input, direct) {
            (RowValues::Floats(float_type), false) => input_fragments(float_type),
            (RowValues::Floats(FloatType::Bf16), true) => vec![shader!("fragments/direct_bf16.wgsl")],
            (RowValues::Floats(FloatType::F32 | FloatType::F16), true) => vec![shader!("fragments/direct_f32.wgsl")],
            (RowValues::Codes { code: ActivationCode::E4m3, group: _, scales: _ }, false) => {
                vec![shader!("fragments/decode_e4m3.wgsl"), shader!("fragments/input_e4m3.wgsl")]
            }
            (RowValues::Codes { code: ActivationCode::E4m3, group: _, scales: _ }, true) => {
                let mut fragments = four_e4m3(self.exact_halves).to_vec();
                fragments.push(shader!("fragments/direct_e4m3.wgsl"));
                fragments
            }
            (RowValues::Codes { code: ActivationCode::Int8, group: _, scales: _ }, false) => {
                vec![shader!("fragments/input_int8.wgsl")]
            }
            (RowValues::Codes { code: ActivationCode::Int8, group: _, scales: _ }, true) => {
                vec![shader!("fragments/direct_int8.wgsl")]
            }
        }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        self.run_with(arguments, &Twin(self))
    }

    /// The twin with other products of the same meaning.
    pub(crate) fn run_with(&self, arguments: &mut Arguments<'_>, products: &impl Products) -> Result<()> {
        // Taken, not borrowed: a thread that waits for another's part may begin another call meanwhile.
        let mut memory = MEMORY.take();
        let result = self.run_in(arguments, products, &mut memory);
        MEMORY.set(memory);
        result
    }

    /// Makes room, on this thread, for a call on buffers of so many words with these products.
    pub(crate) fn reserve(&self, products: &impl Products, words: impl Iterator<Item = (&'static str, usize)>) {
        let (mut out, mut spans) = (0, 0);
        for (name, words) in words {
            match name {
                "out" => out = words,
                "spans" => spans = words,
                _ => {}
            }
        }
        let (rows, groups) = (out / self.features().max(1), spans / SPAN_WORDS);
        let entering = rows.div_ceil(self.shared_by());
        let mut memory = MEMORY.take();
        let Memory { slots, starts, by_slot, place, used, values, scales, arranged, tasks, results } = &mut memory;
        make_room(slots, rows);
        make_room(starts, groups + 1);
        make_room(by_slot, rows);
        make_room(place, entering);
        make_room(used, entering);
        make_room(values, entering * products.padded());
        make_room(scales, entering * self.scales_per_row());
        make_room(arranged, entering);
        make_room(tasks, groups * self.features().div_ceil(STRETCH));
        make_room(results, out);
        MEMORY.set(memory);
        products.reserve();
    }

    /// Rows that read one decoded row: those of an entering row, unless each is weighted by itself.
    fn shared_by(&self) -> usize {
        if self.weigh_input.is_some() { 1 } else { self.input_divisor }
    }

    /// Columns of a row that the twin decodes: whole vectors of codes.
    fn padded(&self) -> usize {
        let layout = self.layout();
        layout.vecs_per_row() * layout.codes_per_vec()
    }

    /// Scales of an entering row.
    fn scales_per_row(&self) -> usize {
        match self.input {
            RowValues::Floats(_) => 0,
            RowValues::Codes { code: _, group, scales: _ } => self.cols.div_ceil(group.unwrap_or(self.cols)),
        }
    }

    fn run_in(&self, arguments: &mut Arguments<'_>, products: &impl Products, memory: &mut Memory) -> Result<()> {
        let Memory { slots, starts, by_slot, place, used, values, scales, arranged, tasks, results } = memory;
        let rows = arguments.read("rows")?;
        let segment = arguments.read("segment")?;
        let spans = arguments.read("spans")?;
        slots.clear();
        match (self.variant, self.rows) {
            (
                GemmVariant::Gemv { workgroup_size: _, lanes: _, tile_rows: _ }
                | GemmVariant::Rows { workgroup_size: _, lanes: _, tile_rows: _, rows: _ }
                | GemmVariant::Tiled
                | GemmVariant::Mma { rows: _ }
                | GemmVariant::Wgmma { rows: _, matrix_blocks: _, matrix_vecs: _ },
                RowSource::Direct { groups },
            ) => slots.extend((0..arguments.tokens()? * groups).map(|row| (row % groups) as i32)),
            (
                GemmVariant::Gemv { workgroup_size: _, lanes: _, tile_rows: _ },
                RowSource::Routed { top_k, num_slots },
            ) => {
                let found = &arguments.read_i32("row_slots")?[..arguments.tokens()? * top_k];
                slots.extend(found.iter().map(|&slot| if slot < num_slots as i32 { slot } else { -1 }));
            }
            (
                GemmVariant::Rows { workgroup_size: _, lanes: _, tile_rows: _, rows: _ }
                | GemmVariant::Tiled
                | GemmVariant::Mma { rows: _ }
                | GemmVariant::Wgmma { rows: _, matrix_blocks: _, matrix_vecs: _ },
                RowSource::Routed { top_k: _, num_slots: _ },
            ) => {
                let sorted_rows = arguments.read("sorted_rows")?;
                let tiles = arguments.read("tiles")?;
                slots.resize(sorted_rows.len(), -1);
                for tile in tiles.chunks_exact(4).skip(1).take(tiles[0] as usize) {
                    let (first, count) = (tile[1] as usize, tile[2] as usize);
                    for &row in &sorted_rows[first..first + count] {
                        slots[row as usize] = tile[0] as i32;
                    }
                }
            }
        }
        let (features, feature_rows) = (self.features(), self.feature_rows());
        let out = arguments.write("out")?;
        let groups = spans.len() / SPAN_WORDS;
        sort_by_slot(slots, groups, starts, by_slot);
        let rows_of = |slot: usize| &by_slot[starts[slot]..starts[slot + 1]];
        let padded = products.padded();
        // An entering row for all its rows, or weighted for each. Those that nobody reads are not decoded; buffers
        // may be longer than this call's rows.
        let divisor = self.shared_by();
        place.clear();
        place.resize(by_slot.iter().max().map_or(0, |row| row / divisor + 1), usize::MAX);
        used.clear();
        for row in by_slot.iter() {
            let at = &mut place[row / divisor];
            if *at == usize::MAX {
                *at = used.len();
                used.push(row / divisor);
            }
        }
        let weights = self.weigh_input.map(|_| arguments.read_f32("topk_weights")).transpose()?;
        scales.clear();
        let per_row = self.scales_per_row();
        match self.input {
            RowValues::Floats(_) => {}
            RowValues::Codes { code: _, group: _, scales: layout } => {
                let words = arguments.read("input_scales")?;
                for index in &used[..] {
                    let row = index * divisor / self.input_divisor;
                    scales.extend((0..per_row).map(|at| layout.read(words, row, at, per_row)));
                }
            }
        }
        values.clear();
        values.resize(used.len() * padded, 0.0);
        arranged.clear();
        arranged.resize(used.len(), false);
        let entering = values.par_chunks_exact_mut(padded.max(1)).zip(&mut arranged[..]).zip(&used[..]);
        entering.enumerate().for_each(|(at, ((values, arranged), &index))| {
            decode_row(rows, self.input, index * divisor / self.input_divisor, self.cols, values);
            if let (Some(rounding), Some(weights)) = (self.weigh_input, weights) {
                for value in &mut values[..self.cols] {
                    *value = self.round(rounding, *value * weights[index]);
                }
            }
            *arranged = products.arrange(values, &scales[at * per_row..][..per_row]);
        });
        let entering = |row: usize| {
            let at = place[row / divisor];
            let scales = &scales[at * per_row..][..per_row];
            EnteringRow { values: &values[at * padded..][..padded], scales, arranged: arranged[at] }
        };
        let epilogue = EpilogueInputs::read(self.epilogue, arguments)?;
        let delta = self.delta.map(|_| arguments.read_f32("delta")).transpose()?;
        // One task per group and stretch of features: a weight is decoded once for all rows of its group,
        // and a single token still uses every thread.
        tasks.clear();
        let mut offset = 0;
        for slot in (0..groups).filter(|&slot| !rows_of(slot).is_empty()) {
            let [begin, end] = [0, 1].map(|word| spans[slot * SPAN_WORDS + word] as usize / feature_rows);
            for first in (begin..end).step_by(STRETCH) {
                let task = Task { slot, first, end: (first + STRETCH).min(end), offset };
                offset += rows_of(slot).len() * (task.end - first);
                tasks.push(task);
            }
        }
        results.clear();
        results.resize(offset, 0.0);
        let compute = |&Task { slot, first, end, offset: _ }: &Task, values: &mut [f32]| {
            let span = &spans[slot * SPAN_WORDS..][..SPAN_WORDS];
            let rows = rows_of(slot);
            let packed = first * feature_rows..end * feature_rows;
            let mut store = |packed: usize, numbers: &[usize], sums: &[f32]| {
                // A division by 1 or 2 would be one by any number.
                let (feature, part) = if feature_rows == 1 { (packed, 0) } else { (packed / 2, packed % 2) };
                let bias = if self.bias { segment[(span[4] + packed as u32 - span[0]) as usize] } else { 0 };
                for (&at, &sum) in numbers.iter().zip(sums) {
                    let row = rows[at];
                    let added = delta.map(|delta| delta[row * self.matrix_rows + packed]);
                    let sum = self.adapt(sum, added) + f32::from_bits(bias);
                    // The gate's sum waits where the result will stand.
                    let value = &mut values[at * (end - first) + feature - first];
                    let sums = if part == 0 { [sum, 0.0] } else { [*value, sum] };
                    *value = match part + 1 == feature_rows {
                        true => self.finish(&epilogue, row, feature, sums),
                        false => sum,
                    };
                }
            };
            products.sums(&Lot { segment, span, packed }, rows.len(), &|at| entering(rows[at]), &mut store);
        };
        each_task(tasks, results, &compute);
        if self.fill_absent {
            for (row, slot) in slots.iter().enumerate().filter(|(_, slot)| **slot < 0) {
                let value: f32 = if *slot == -1 { 0.0 } else { f32::NAN };
                out[row * features..(row + 1) * features].fill(value.to_bits());
            }
        }
        for &Task { slot, first, end, offset } in tasks.iter() {
            for (row, values) in rows_of(slot).iter().zip(results[offset..].chunks_exact(end - first)) {
                for (value, at) in values.iter().zip(row * features + first..) {
                    match self.stored {
                        FloatType::F32 | FloatType::F16 => out[at] = value.to_bits(),
                        FloatType::Bf16 => {
                            let (word, shift) = (&mut out[at / 2], 16 * (at % 2));
                            *word = *word & !(0xffff << shift) | value.to_bits() >> 16 << shift;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Who multiplies packed rows with entering rows, whatever comes before and behind.
pub(crate) trait Products: Sync {
    /// Makes room, on this thread, for what `sums` needs.
    fn reserve(&self);

    /// Values of an entering row, what it is padded with included.
    fn padded(&self) -> usize;

    /// May rearrange an entering row, decoded and padded with zeros, and multiply its scales in; whether it did.
    fn arrange(&self, values: &mut [f32], scales: &[f32]) -> bool;

    /// The sum of each packed row of the lot with each of `rows` entering rows, once, scales and all:
    /// `store(packed row, numbers of entering rows, their sums)`, of an entering row in order of packed rows.
    fn sums<'a>(
        &self,
        lot: &Lot<'_>,
        rows: usize,
        entering: &impl Fn(usize) -> EnteringRow<'a>,
        store: &mut impl FnMut(usize, &[usize], &[f32]),
    );
}

/// Packed rows of one group.
pub(crate) struct Lot<'a> {
    /// The segment that holds them.
    pub segment: &'a [u32],
    /// The group's row of the span table.
    pub span: &'a [u32],
    /// Which.
    pub packed: Range<usize>,
}

/// The products of the twin of a kernel: plain loops.
pub(crate) struct Twin<'a>(pub &'a GroupedGemm);

impl Products for Twin<'_> {
    fn reserve(&self) {
        let mut weights = WEIGHTS.take();
        make_room(&mut weights, self.0.padded());
        WEIGHTS.set(weights);
    }

    fn padded(&self) -> usize {
        self.0.padded()
    }

    fn arrange(&self, _values: &mut [f32], _scales: &[f32]) -> bool {
        false
    }

    fn sums<'a>(
        &self,
        lot: &Lot<'_>,
        rows: usize,
        entering: &impl Fn(usize) -> EnteringRow<'a>,
        store: &mut impl FnMut(usize, &[usize], &[f32]),
    ) {
        let &Lot { segment, span, ref packed } = lot;
        let (layout, padded) = (self.0.layout(), self.0.padded());
        let group = match self.0.input {
            RowValues::Floats(_) => self.0.cols,
            RowValues::Codes { code: _, group, scales: _ } => group.unwrap_or(self.0.cols),
        };
        let k_block = self.0.k_block().unwrap_or(padded);
        let mut weights = WEIGHTS.take();
        weights.clear();
        weights.resize(padded, 0.0);
        for packed in packed.clone() {
            layout.decode(segment, span, packed, &mut weights);
            for at in 0..rows {
                let x = entering(at);
                // Other products may pad further.
                let x = EnteringRow { values: &x.values[..padded], ..x };
                let sum = match x.scales.is_empty() {
                    true => layout.dot(segment, span, packed, &weights, x.values),
                    false => layout.code_dot(segment, span, packed, &weights, x, [group, k_block]),
                };
                store(packed, &[at], &[sum]);
            }
        }
        WEIGHTS.set(weights);
    }
}

/// Empties it, with room for so many.
fn make_room<T>(memory: &mut Vec<T>, count: usize) {
    memory.clear();
    // Without the room a call allocates what it needs, which may be less.
    let _ = memory.try_reserve(count);
}

/// Features of a task.
const STRETCH: usize = 32;

/// What the twin needs beside its buffers. Each thread keeps its own, as large as its largest call.
#[derive(Default)]
struct Memory {
    /// Of each row; less than 0 for none.
    slots: Vec<i32>,
    /// Where the rows of each slot begin in `by_slot`, and where the last end.
    starts: Vec<usize>,
    /// Rows in order of their slots.
    by_slot: Vec<usize>,
    /// Of each entering row in `values`, or `usize::MAX`.
    place: Vec<usize>,
    /// The entering rows that are read, in order of their places.
    used: Vec<usize>,
    /// Their values, padded with zeros.
    values: Vec<f32>,
    /// Their scales.
    scales: Vec<f32>,
    /// Whether the products have rearranged them.
    arranged: Vec<bool>,
    tasks: Vec<Task>,
    /// What each task computes: rows of its features.
    results: Vec<f32>,
}

thread_local! {
    static MEMORY: Cell<Memory> = Cell::default();
    /// One packed row, decoded.
    static WEIGHTS: Cell<Vec<f32>> = Cell::default();
}

/// Some features of all rows of a group.
struct Task {
    slot: usize,
    first: usize,
    end: usize,
    /// First value in the results.
    offset: usize,
}

/// Runs tasks side by side, each on its part of the results.
fn each_task(tasks: &[Task], results: &mut [f32], run: &(impl Fn(&Task, &mut [f32]) + Sync)) {
    match tasks {
        [] => {}
        [task] => run(task, results),
        [first, ..] => {
            let (left, right) = tasks.split_at(tasks.len() / 2);
            let cut = right.first().map_or(0, |task| task.offset - first.offset);
            let (of_left, of_right) = results.split_at_mut(cut);
            rayon::join(|| each_task(left, of_left, run), || each_task(right, of_right, run));
        }
    }
}

/// Rows in order of slot, stable, and where those of each begin; slots outside `0..groups` are left out.
fn sort_by_slot(slots: &[i32], groups: usize, starts: &mut Vec<usize>, by_slot: &mut Vec<usize>) {
    let legal = |slot: &i32| usize::try_from(*slot).ok().filter(|slot| *slot < groups);
    starts.clear();
    starts.resize(groups + 1, 0);
    slots.iter().filter_map(legal).for_each(|slot| starts[slot + 1] += 1);
    for slot in 0..groups {
        starts[slot + 1] += starts[slot];
    }
    by_slot.clear();
    by_slot.resize(starts[groups], 0);
    for (row, slot) in slots.iter().enumerate() {
        if let Some(slot) = legal(slot) {
            by_slot[starts[slot]] = row;
            starts[slot] += 1;
        }
    }
    // Each begin has become its end, which is the next one's begin.
    starts.copy_within(..groups, 1);
    starts[0] = 0;
}

/// What an epilogue reads beside the sums.
struct EpilogueInputs<'a> {
    weights: Option<&'a [f32]>,
    states: Option<(&'a [f32], &'a [f32])>,
}

impl<'a> EpilogueInputs<'a> {
    fn read(epilogue: Epilogue, arguments: &Arguments<'a>) -> Result<Self> {
        let mut inputs = Self { weights: None, states: None };
        match epilogue {
            Epilogue::Sums | Epilogue::GeluErf => {}
            Epilogue::AddState => {
                let states = arguments.read_f32("previous_router_states")?;
                inputs.states = Some((states, arguments.read_f32("router_states_scale")?));
            }
            Epilogue::Weighted => inputs.weights = Some(arguments.read_f32("topk_weights")?),
            Epilogue::Activation(activated) => {
                if activated.weighted {
                    inputs.weights = Some(arguments.read_f32("topk_weights")?);
                }
            }
        }
        Ok(inputs)
    }
}

impl GroupedGemm {
    fn round(&self, rounding: Rounding, value: f32) -> f32 {
        match rounding {
            Rounding::F32 => value,
            Rounding::Model => numerics::round_to(self.model, value),
        }
    }

    /// Twin: shaders/fragments/delta_*.wgsl
    fn adapt(&self, sum: f32, added: Option<f32>) -> f32 {
        let model = |value| numerics::round_to(self.model, value);
        let Some(added) = added else { return sum };
        match self.delta {
            None => sum,
            Some(LoraDelta::F32) => sum + added,
            Some(LoraDelta::Model) => model(model(sum) + model(added)),
        }
    }

    /// Twin: shaders/fragments/epilogue_*.wgsl
    fn finish(&self, inputs: &EpilogueInputs<'_>, row: usize, feature: usize, sums: [f32; 2]) -> f32 {
        let first = sums[0];
        match self.epilogue {
            Epilogue::Sums => first,
            Epilogue::AddState => inputs
                .states
                .map_or(f32::NAN, |(states, scale)| first + states[row * self.features() + feature] * scale[feature]),
            Epilogue::GeluErf => numerics::gelu_erf(first),
            Epilogue::Weighted => {
                let weight = inputs.weights.map_or(f32::NAN, |weights| weights[row]);
                numerics::round_to(self.model, weight * first)
            }
            Epilogue::Activation(activation) => {
                let weight = inputs.weights.map(|weights| weights[row]);
                activation.apply(self.model, [first, sums[self.pair - 1]], weight)
            }
        }
    }
}

/// A row as f32, and where it holds codes their scales.
#[derive(Clone, Copy)]
pub(crate) struct EnteringRow<'a> {
    /// Padded.
    pub values: &'a [f32],
    /// One for each group of columns, or for the row.
    pub scales: &'a [f32],
    /// Whether the products have rearranged the values.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the twin rearranges nothing"))]
    pub arranged: bool,
}

/// One entering row as f32 in the first `cols` values.
fn decode_row(words: &[u32], input: RowValues, row: usize, cols: usize, values: &mut [f32]) {
    let first = row * input.stride(cols);
    let values = &mut values[..cols];
    match input {
        RowValues::Floats(FloatType::Bf16) if first.is_multiple_of(2) => {
            // Two of a word at once, which is most rows of most models.
            let (pairs, rest) = values.as_chunks_mut::<2>();
            for (pair, word) in pairs.iter_mut().zip(&words[first / 2..]) {
                *pair = [word << 16, word & 0xffff_0000].map(f32::from_bits);
            }
            rest.iter_mut().for_each(|value| *value = decode_value(words, FloatType::Bf16, first + cols - 1));
        }
        RowValues::Floats(float_type) => {
            for (at, value) in (first..).zip(values) {
                *value = decode_value(words, float_type, at);
            }
        }
        RowValues::Codes { code, group: _, scales: _ } => {
            for (at, value) in (first..).zip(values) {
                *value = numerics::decode_activation(code, (words[at / 4] >> (8 * (at % 4))) as u8);
            }
        }
    }
}

impl PackedMatrix {
    /// Scales that the codes of a vector can have; `lower` sees to it that it is 1 or 2.
    fn scales_per_vec(&self) -> usize {
        let halves = |blocks: PackedBlocks| !blocks.act_order && !blocks.cols.is_multiple_of(32) && blocks.per_row > 1;
        if self.codes_per_vec() == 32 && self.blocks().is_some_and(halves) { 2 } else { 1 }
    }

    /// The codes of one packed row as f32, without scale.
    fn decode(&self, segment: &[u32], span: &[u32], packed: usize, weights: &mut [f32]) {
        let row_words = self.vecs_per_row() * 4;
        let codes = 4 * span[2] as usize + (packed - span[0] as usize) * row_words;
        let words = &segment[codes..codes + row_words];
        let (code, per_word) = (self.parts.code, self.codes_per_vec() / 4);
        let bits = 32 / per_word as u32;
        let table = numerics::e4m3_values();
        for (word, weights) in words.iter().zip(weights.chunks_exact_mut(per_word)) {
            for (at, weight) in weights.iter_mut().enumerate() {
                let one = word >> (bits * at as u32) & (u32::MAX >> (32 - bits));
                *weight = match code {
                    Code::E4m3 => table[one as usize],
                    Code::F32 | Code::F16 | Code::Bf16 | Code::E2m1 | Code::Int8 | Code::Int4 | Code::Uint4 => {
                        numerics::decode(code, one)
                    }
                };
            }
        }
    }

    /// One packed row, decoded, times x: one f32 partial sum a scale block, scaled, then added.
    fn dot(&self, segment: &[u32], span: &[u32], packed: usize, weights: &[f32], x: &[f32]) -> f32 {
        let sum = match self.blocks() {
            None => lane_dot(weights, x),
            Some(blocks) => {
                let row = blocks.scale_row(self.pair, packed, span[5] as usize);
                let scales = &segment[span[3] as usize + row * blocks.words..][..blocks.words];
                if blocks.act_order {
                    let order = &segment[span[7] as usize + packed % self.pair * self.cols..][..self.cols];
                    let one = |((weight, x), block): ((&f32, &f32), &u32)| {
                        let [scale, zero, _] = blocks.scale_of(scales, *block as usize);
                        (weight - zero) * scale * x
                    };
                    weights.iter().zip(x).zip(order).map(one).sum()
                } else {
                    let parts = weights.chunks(blocks.cols).zip(x.chunks(blocks.cols)).take(blocks.per_row);
                    let one = |(block, (weights, x)): (usize, (&[f32], &[f32]))| {
                        let [scale, zero, min] = blocks.scale_of(scales, block);
                        let total = || x.iter().sum::<f32>();
                        match (zero == 0.0, min == 0.0) {
                            (true, true) => lane_dot(weights, x) * scale,
                            (true, false) => lane_dot(weights, x) * scale - min * total(),
                            (false, _) => lane_dot_less(weights, zero, x) * scale - min * total(),
                        }
                    };
                    parts.enumerate().map(one).sum()
                }
            }
        };
        sum * self.row_scale(segment, span, packed)
    }

    /// What scales a whole row.
    pub(crate) fn row_scale(&self, segment: &[u32], span: &[u32], packed: usize) -> f32 {
        match self.parts.row_scale {
            true => f32::from_bits(segment[span[6] as usize + packed - span[0] as usize]),
            false => 1.0,
        }
    }

    /// One packed row, decoded, times a row of codes: one f32 sum a K block, both scales, then added.
    fn code_dot(
        &self,
        segment: &[u32],
        span: &[u32],
        packed: usize,
        weights: &[f32],
        x: EnteringRow<'_>,
        [group, k_block]: [usize; 2],
    ) -> f32 {
        let blocks = self.blocks().map(|blocks| {
            let row = blocks.scale_row(self.pair, packed, span[5] as usize);
            (blocks, &segment[span[3] as usize + row * blocks.words..][..blocks.words])
        });
        let row_scale = self.row_scale(segment, span, packed);
        let parts = weights.chunks(k_block).zip(x.values.chunks(k_block)).enumerate();
        let one = |(at, (weights, values)): (usize, (&[f32], &[f32]))| {
            let col = (at * k_block).min(self.cols - 1);
            let [scale, zero, _] = match blocks {
                None => [1.0, 0.0, 0.0],
                Some((blocks, words)) => blocks.scale_of(words, (col / blocks.cols).min(blocks.per_row - 1)),
            };
            let sum = match zero == 0.0 {
                true => lane_dot(weights, values),
                false => lane_dot_less(weights, zero, values),
            };
            // A scale of a whole row acts behind the sum.
            sum * (scale * if x.scales.len() == 1 { 1.0 } else { x.scales[col / group] })
        };
        let sum: f32 = parts.map(one).sum();
        sum * (row_scale * if x.scales.len() == 1 { x.scales[0] } else { 1.0 })
    }
}

/// A dot product in sixteen sums side by side, which compilers turn into vector instructions.
fn lane_dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_lanes, b_lanes) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0f32; 16];
    for (a, b) in a_lanes.zip(b_lanes) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Likewise with `zero` taken off each of `a`: no copy of them is made, and nothing is taken off where it is 0.
fn lane_dot_less(a: &[f32], zero: f32, b: &[f32]) -> f32 {
    let (a_lanes, b_lanes) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a_lanes.remainder().iter().zip(b_lanes.remainder()).map(|(a, b)| (a - zero) * b).sum();
    let mut sums = [0.0f32; 16];
    for (a, b) in a_lanes.zip(b_lanes) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += (a - zero) * b;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Where the tiles of at most `tile_rows` rows come from.
fn tile_source(
    rows: RowSource,
    tile_rows: usize,
    constants: &mut Vec<(&'static str, Value)>,
    bindings: &mut Vec<Binding>,
    fragments: &mut Vec<Fragment>,
) {
    match rows {
        RowSource::Direct { groups } => {
            constants.push(("TILE_M", Value::U32(tile_rows as u32)));
            constants.push(("GROUPS", Value::U32(groups as u32)));
            fragments.push(shader!("fragments/tiles_direct.wgsl"));
        }
        RowSource::Routed { top_k: _, num_slots: _ } => {
            bindings.extend([read("sorted_rows", "array<u32>"), read("tiles", "array<vec4<u32>>")]);
            fragments.push(shader!("fragments/tiles_permuted.wgsl"));
            // The list of tiles says how many rows there are.
            bindings.retain(|binding| binding.access != Access::Uniform);
            fragments.retain(|fragment| fragment.path != "fragments/params.wgsl");
        }
    }
}

/// Four codes of a word at once, and one.
fn four_e4m3(exact_halves: bool) -> [Fragment; 2] {
    let four = match exact_halves {
        true => shader!("fragments/four_e4m3_halves.wgsl"),
        false => shader!("fragments/four_e4m3_bits.wgsl"),
    };
    [shader!("fragments/decode_e4m3.wgsl"), four]
}

/// Decoding of codes, and their scales.
fn weight_fragments(
    layout: &PackedMatrix,
    exact_halves: bool,
    constants: &mut Vec<(&'static str, Value)>,
    fragments: &mut Vec<Fragment>,
) {
    let Parts { code, blocks: _, row_scale } = layout.parts;
    match code {
        Code::F32 => fragments.push(shader!("fragments/weight_f32.wgsl")),
        Code::F16 => {
            let all = match exact_halves {
                true => shader!("fragments/weight_f16_halves.wgsl"),
                false => shader!("fragments/weight_f16.wgsl"),
            };
            fragments.extend([shader!("fragments/decode_f16.wgsl"), all]);
        }
        Code::Bf16 => fragments.push(shader!("fragments/weight_bf16.wgsl")),
        Code::E4m3 => {
            fragments.extend(four_e4m3(exact_halves));
            fragments.push(shader!("fragments/weight_e4m3.wgsl"));
        }
        Code::E2m1 => fragments.push(match exact_halves {
            true => shader!("fragments/weight_e2m1_halves.wgsl"),
            false => shader!("fragments/weight_e2m1.wgsl"),
        }),
        Code::Int8 => fragments.push(shader!("fragments/weight_int8.wgsl")),
        Code::Int4 => {
            constants.push(("CODE_ZERO", Value::F32(8.0)));
            fragments.push(shader!("fragments/weight_int4.wgsl"));
        }
        Code::Uint4 => {
            constants.push(("CODE_ZERO", Value::F32(0.0)));
            fragments.push(shader!("fragments/weight_int4.wgsl"));
        }
    }
    match layout.blocks() {
        None => fragments.push(shader!("fragments/scale_none.wgsl")),
        Some(blocks) => {
            let PackedBlocks { rows, cols, per_row, scale, words, act_order } = blocks;
            constants.push(("BLOCK_ROWS", Value::U32(rows as u32)));
            constants.push(("SCALE_WORDS", Value::U32(words as u32)));
            fragments.extend(match scale {
                PackedScale::F32 => vec![shader!("fragments/scale_f32.wgsl")],
                PackedScale::F16 => vec![shader!("fragments/decode_f16.wgsl"), shader!("fragments/scale_f16.wgsl")],
                PackedScale::Bf16 => vec![shader!("fragments/scale_bf16.wgsl")],
                PackedScale::E8m0 => vec![shader!("fragments/scale_e8m0.wgsl")],
                PackedScale::E4m3 => vec![shader!("fragments/decode_e4m3.wgsl"), shader!("fragments/scale_e4m3.wgsl")],
                PackedScale::F16Zero => {
                    vec![shader!("fragments/decode_f16.wgsl"), shader!("fragments/scale_f16_zero.wgsl")]
                }
                PackedScale::Bf16Zero => vec![shader!("fragments/scale_bf16_zero.wgsl")],
                PackedScale::Q4K => vec![shader!("fragments/decode_f16.wgsl"), shader!("fragments/scale_q4_k.wgsl")],
                PackedScale::Q6K => vec![shader!("fragments/decode_f16.wgsl"), shader!("fragments/scale_q6_k.wgsl")],
            });
            fragments.push(shader!("fragments/scale_row.wgsl"));
            fragments.push(if act_order {
                shader!("fragments/block_order.wgsl")
            } else {
                constants.push(("BLOCK_COLS", Value::U32(cols as u32)));
                constants.push(("BLOCKS_PER_ROW", Value::U32(per_row as u32)));
                shader!("fragments/block_columns.wgsl")
            });
        }
    }
    fragments.push(if row_scale {
        shader!("fragments/row_scale_rows.wgsl")
    } else {
        shader!("fragments/row_scale_none.wgsl")
    });
}

fn activation_fragments(activation: Activation, constants: &mut Vec<(&'static str, Value)>) -> Vec<Fragment> {
    let silu = shader!("fragments/silu.wgsl");
    let keep_nan = shader!("fragments/keep_nan.wgsl");
    let mut limited = |limit: f32| {
        constants.push(("SWIGLU_LIMIT", Value::F32(limit)));
        [keep_nan, shader!("fragments/clamp.wgsl"), silu]
    };
    let (mut fragments, last) = match activation {
        Activation::Swiglu { limit: None } => (vec![silu], shader!("fragments/activate_swiglu.wgsl")),
        Activation::Swiglu { limit: Some(limit) } => {
            (limited(limit).to_vec(), shader!("fragments/activate_swiglu_clamped.wgsl"))
        }
        Activation::SwigluClampAfter { limit } => {
            (limited(limit).to_vec(), shader!("fragments/activate_swiglu_clamped_after.wgsl"))
        }
        Activation::SwigluOai { alpha, limit, beta } => {
            let (fragments, last) = match limit {
                None => (vec![silu], shader!("fragments/activate_swiglu_oai.wgsl")),
                Some(limit) => (limited(limit).to_vec(), shader!("fragments/activate_swiglu_oai_clamped.wgsl")),
            };
            constants.push(("SWIGLU_ALPHA", Value::F32(alpha)));
            constants.push(("SWIGLU_BETA", Value::F32(beta)));
            (fragments, last)
        }
        Activation::Situ { beta, linear_beta } => {
            constants.push(("SITU_BETA", Value::F32(beta)));
            constants.push(("SITU_LINEAR_BETA", Value::F32(linear_beta)));
            let needs = vec![keep_nan, shader!("fragments/sigmoid.wgsl"), shader!("fragments/tanh.wgsl")];
            (needs, shader!("fragments/activate_situ.wgsl"))
        }
        Activation::GeluTanh => (vec![silu], shader!("fragments/activate_gelu_tanh.wgsl")),
        Activation::GeluErf => (vec![shader!("fragments/gelu_erf.wgsl")], shader!("fragments/activate_gelu_erf.wgsl")),
        Activation::Relu2 => (vec![keep_nan], shader!("fragments/activate_relu2.wgsl")),
    };
    fragments.push(last);
    fragments
}
