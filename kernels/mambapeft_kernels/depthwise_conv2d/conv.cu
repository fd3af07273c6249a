// Depthwise 3x3 convolution on a channel-last map. Macros: IO_BF16; HEIGHT, WIDTH; E channels, even; HAS_BIAS; ROWS of a
// thread; MODE: 0 u = silu(conv(x)), 1 the gradient of conv(x) from that of u, 2 the gradient of x from that of conv(x)
// (the filter turned round, no activation).
//
// A thread owns two channels and ROWS rows of one map, and walks along the columns: what it has read of three columns
// stays in registers. A warp reads 64 channels side by side.

constexpr int IN = ROWS + 2;  // of what the outputs read

struct Column {
    float at[IN][2];
};

extern "C" __global__ void __launch_bounds__(128) depthwise(
    const io_t* __restrict__ x, const io_t* __restrict__ du, const float* __restrict__ weight,
    const float* __restrict__ bias, io_t* __restrict__ out, int batch) {
    const Place place;
    if (place.is_outside(batch)) return;
    const int pair = place.pair, first = place.first_row();
    const i64 map = place.map();

    float filter[9][2], shift[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) filter[tap][c] = weight[(2 * pair + c) * 9 + (MODE == 2 ? 8 - tap : tap)];
        shift[c] = HAS_BIAS && MODE != 2 ? bias[2 * pair + c] : 0.0f;
    }

    const io_t* row[IN];
    bool live[IN];
#pragma unroll
    for (int r = 0; r < IN; ++r) {
        const int i = first + r - 1;
        live[r] = i >= 0 && i < HEIGHT;
        row[r] = x + map + (i64)(live[r] ? i : 0) * WIDTH * E;
    }
    const io_t* du_row[ROWS];
    io_t* out_row[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const i64 at = map + (i64)(live[r + 1] ? first + r : 0) * WIDTH * E;
        du_row[r] = MODE == 1 ? du + at : nullptr;
        out_row[r] = out + at;
    }

    auto read = [&](Pack<2>* into, int column) {
#pragma unroll
        for (int r = 0; r < IN; ++r) {
            if (live[r] && column < WIDTH)
                into[r].load_vector(row[r] + column * E);
            else
                into[r].clear();
        }
    };
    auto widened = [](const Pack<2>* from) {
        Column column;
#pragma unroll
        for (int r = 0; r < IN; ++r) column.at[r][0] = from[r].get(0), column.at[r][1] = from[r].get(1);
        return column;
    };

    Pack<2> coming[2][IN], grads[2][ROWS];
    auto read_gradients = [&](Pack<2>* into, int column) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (MODE == 1 && live[r + 1] && column < WIDTH)
                into[r].load_vector(du_row[r] + column * E);
            else
                into[r].clear();
        }
    };
    Column left = {}, middle, right;
    read(coming[0], 0);
    middle = widened(coming[0]);
    read(coming[0], 1);
    read(coming[1], 2);
    read_gradients(grads[0], 0);
    read_gradients(grads[1], 1);
#pragma unroll 6
    for (int j = 0; j < WIDTH; ++j) {
        right = widened(coming[j & 1]);
        read(coming[j & 1], j + 3);
        Pack<2> grad[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) grad[r] = grads[j & 1][r];
        read_gradients(grads[j & 1], j + 2);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float value[2];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                float sum = shift[c];
#pragma unroll
                for (int a = 0; a < 3; ++a) {
                    sum += filter[3 * a][c] * left.at[r + a][c];
                    sum += filter[3 * a + 1][c] * middle.at[r + a][c];
                    sum += filter[3 * a + 2][c] * right.at[r + a][c];
                }
                const float gate = MODE == 2 ? 1.0f : sigmoid(sum);
                if (MODE == 0) value[c] = sum * gate;
                if (MODE == 1) value[c] = grad[r].get(c) * gate * (1.0f + sum * (1.0f - gate));
                if (MODE == 2) value[c] = sum;
            }
            Pack<2> result;
            result.set_pair(0, value[0], value[1]);
            if (live[r + 1]) result.store_vector(out_row[r] + j * E);
        }
        left = middle, middle = right;
    }
}
