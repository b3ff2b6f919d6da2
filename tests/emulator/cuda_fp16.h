// Nothing of it is used below compute capability 8.9.
#pragma once
