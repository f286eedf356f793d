struct Tile {
    slot: i32,
    first: u32,
    count: u32,
}

// tiles[0].x counts the tiles that follow. Twin: kernels::permute.
fn tile_of(index: u32) -> Tile {
    if index >= tiles[0].x {
        return Tile(-1, 0u, 0u);
    }
    let tile = tiles[index + 1u];
    return Tile(bitcast<i32>(tile.x), tile.y, tile.z);
}

fn tile_row(tile: Tile, position: u32) -> u32 {
    return sorted_rows[position];
}
