#pragma once

constexpr int kAnswer = 40;
