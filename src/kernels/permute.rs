//! `permute`: rows in order of expert, stable, and the list of tiles that the tiled GEMM walks.
//!
//! `topk_ids` `[rows]` to `sorted_rows` `[rows]` and `tiles` [1 + tiles] of (the expert's slot, first
//! position, rows, 0), where `tiles[0].x` counts the rest. Ids outside `0..num_experts` are left out. Exact.

use super::grouped_gemm::TILE_ROWS;
use super::{Arguments, PARAMS, Source, Value, read, shader, write};
use crate::error::Result;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permute {
    /// E.
    pub num_experts: usize,
    /// k.
    pub top_k: usize,
}

impl Permute {
    /// Most tiles that `rows` rows can make.
    pub fn max_tiles(&self, rows: usize) -> usize {
        rows.min(rows / TILE_ROWS + self.num_experts)
    }

    /// A count an expert and two scans.
    pub(super) fn workgroup_bytes(&self) -> usize {
        4 * (self.num_experts + 2 * 256)
    }

    pub(super) fn source(&self) -> Source {
        let Self { num_experts, top_k } = self;
        Source {
            constants: vec![
                ("NUM_EXPERTS", Value::U32(*num_experts as u32)),
                ("ROWS_PER_TOKEN", Value::U32(*top_k as u32)),
                ("TILE_M", Value::U32(TILE_ROWS as u32)),
            ],
            bindings: vec![
                PARAMS,
                read("topk_ids", "array<i32>"),
                read("expert_slots", "array<i32>"),
                write("sorted_rows", "array<u32>"),
                write("tiles", "array<vec4<u32>>"),
            ],
            fragments: vec![shader!("fragments/params.wgsl"), shader!("permute/stable.wgsl")],
        }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.top_k;
        let expert_slots = arguments.read_i32("expert_slots")?;
        let ids = &arguments.read_i32("topk_ids")?[..rows];
        let sorted_rows = arguments.write("sorted_rows")?;
        let tiles = arguments.write("tiles")?;
        let (mut position, mut count) = (0, 0);
        for (expert, slot) in expert_slots.iter().enumerate().take(self.num_experts) {
            let first = position;
            for row in (0..rows).filter(|&row| usize::try_from(ids[row]) == Ok(expert)) {
                sorted_rows[position] = row as u32;
                position += 1;
            }
            for begin in (first..position).step_by(TILE_ROWS) {
                count += 1;
                let rows = TILE_ROWS.min(position - begin);
                let tile = [*slot as u32, begin as u32, rows as u32, 0];
                tiles[4 * count..4 * count + 4].copy_from_slice(&tile);
            }
        }
        tiles[..4].copy_from_slice(&[count as u32, 0, 0, 0]);
        Ok(())
    }
}
