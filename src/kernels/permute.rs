//! `permute`: rows in order of slot, stable, and the list of tiles that the tiled GEMM walks.
//!
//! `row_slots` `[rows]` to `sorted_rows` `[rows]` and `tiles` [1 + tiles] of (slot, first position, rows, 0),
//! where `tiles[0].x` counts the rest; the tiles of a slot are as few as they can be, and of one height, or full,
//! but for the last. Slots outside `0..num_slots` are left out. Exact.

use super::{Arguments, PARAMS, Source, Value, cuda_blocks, read, shader, write};
use crate::error::Result;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permute {
    /// Matrices.
    pub num_slots: usize,
    /// k.
    pub top_k: usize,
    /// Most rows of a tile.
    pub tile_rows: usize,
    /// Whether all tiles of a slot but the last are full, rather than of one height.
    pub full_tiles: bool,
    /// Whether warps count and rank by votes: CUDA.
    pub warps: bool,
}

impl Permute {
    /// Most tiles that `rows` rows can make.
    pub fn max_tiles(&self, rows: usize) -> usize {
        rows.min(rows / self.tile_rows + self.num_slots)
    }

    /// A count a slot and two scans.
    pub(super) fn workgroup_bytes(&self) -> usize {
        4 * (self.num_slots + 2 * 256)
    }

    pub(super) fn source(&self) -> Source {
        let Self { num_slots, top_k, tile_rows, full_tiles, warps } = self;
        let mut constants = vec![
            ("NUM_SLOTS", Value::U32(*num_slots as u32)),
            ("ROWS_PER_TOKEN", Value::U32(*top_k as u32)),
            ("TILE_M", Value::U32(*tile_rows as u32)),
            ("FULL_TILES", Value::Bool(*full_tiles)),
        ];
        if *warps {
            constants.extend(cuda_blocks(1024));
        }
        Source {
            constants,
            bindings: vec![
                PARAMS,
                read("row_slots", "array<i32>"),
                write("sorted_rows", "array<u32>"),
                write("tiles", "array<vec4<u32>>"),
            ],
            fragments: vec![
                shader!("fragments/params.wgsl"),
                if *warps { shader!("permute/stable.cu") } else { shader!("permute/stable.wgsl") },
            ],
        }
    }

    pub(super) fn run(&self, arguments: &mut Arguments<'_>) -> Result<()> {
        let rows = arguments.tokens()? * self.top_k;
        let slots = &arguments.read_i32("row_slots")?[..rows];
        let sorted_rows = arguments.write("sorted_rows")?;
        let tiles = arguments.write("tiles")?;
        let (mut position, mut count) = (0, 0);
        for slot in 0..self.num_slots {
            let first = position;
            for row in (0..rows).filter(|&row| usize::try_from(slots[row]) == Ok(slot)) {
                sorted_rows[position] = row as u32;
                position += 1;
            }
            let of_slot = position - first;
            let tiles_of_slot = of_slot.div_ceil(self.tile_rows).max(1);
            let even = of_slot.div_ceil(tiles_of_slot).max(1);
            let height = if self.full_tiles { self.tile_rows } else { even };
            for begin in (first..position).step_by(height) {
                count += 1;
                let rows = height.min(position - begin);
                let tile = [slot as u32, begin as u32, rows as u32, 0];
                tiles[4 * count..4 * count + 4].copy_from_slice(&tile);
            }
        }
        tiles[..4].copy_from_slice(&[count as u32, 0, 0, 0]);
        Ok(())
    }
}
