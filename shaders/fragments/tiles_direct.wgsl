struct Tile {
    slot: i32,
    first: u32,
    count: u32,
}

fn tile_of(index: u32) -> Tile {
    let total = token_count() * ROWS_PER_TOKEN;
    let first = index * TILE_M;
    if first >= total {
        return Tile(-1, 0u, 0u);
    }
    return Tile(0, first, min(TILE_M, total - first));
}

fn tile_row(position: u32) -> u32 {
    return position;
}
