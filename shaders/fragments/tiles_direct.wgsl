struct Tile {
    slot: i32,
    first: u32,
    count: u32,
}

// Row token * GROUPS + group meets the matrix of its group: a tile has tokens of one group.
fn tile_of(index: u32) -> Tile {
    let total = token_count();
    let first = index / GROUPS * TILE_M;
    if first >= total {
        return Tile(-1, 0u, 0u);
    }
    return Tile(i32(index % GROUPS), first, min(TILE_M, total - first));
}

fn tile_row(tile: Tile, position: u32) -> u32 {
    return position * GROUPS + u32(tile.slot);
}
